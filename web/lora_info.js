/** What a LoRA file says of itself, in a window over the page: read by our server from the file and beside it alone. */

import { api } from "../../scripts/api.js";
import { make, style } from "./parts.js";
import { translated } from "./phrases.js";
import { language, say } from "./words.js";

const STYLE = `
.graft-info { width: 560px; max-width: 92vw; max-height: 86vh; padding: 16px; overflow: auto; border-radius: 8px;
  font: 13px Inter, Arial, sans-serif; color: var(--input-text); background: var(--comfy-menu-bg);
  border: 1px solid var(--border-color); }
.graft-info::backdrop { background: rgb(0 0 0 / 50%); }
.graft-info h3 { margin: 0 0 12px; font-size: 15px; overflow-wrap: anywhere; }
.graft-info img { display: block; max-width: 100%; max-height: 320px; margin: 0 auto 12px; border-radius: 4px; }
.graft-info table { width: 100%; border-collapse: collapse; }
.graft-info td { padding: 4px 8px 4px 0; vertical-align: top; overflow-wrap: anywhere; border-top: 1px solid var(--border-color); }
.graft-info td:first-child { width: 120px; opacity: 0.7; }
.graft-info footer { display: flex; justify-content: flex-end; gap: 8px; margin-top: 14px; }
.graft-info button { padding: 5px 12px; font: inherit; color: inherit; cursor: pointer; background: var(--comfy-input-bg);
  border: 1px solid var(--border-color); border-radius: 4px; }
`;

const address = (name, path = "") => `/graft/lora${path}?name=${encodeURIComponent(name)}`;

export async function showInfo(name) {
  const answer = await api.fetchApi(address(name));
  const told = answer.ok ? await answer.json() : { problem: say("This file is not in your loras folder") };
  style("graft-info", STYLE);
  const window = make("dialog", { className: "graft-info" }, ...content(name, told));
  window.append(footer(window, told.words ?? []));
  window.addEventListener("close", () => window.remove());
  window.addEventListener("click", ({ target }) => target === window && window.close()); // beside it
  window.addEventListener("keydown", (event) => {
    event.stopPropagation(); // the page has keys of its own, Escape among them
    if (event.key === "Escape") window.close();
  });
  document.body.append(window);
  window.showModal();
}

function content(name, { problem, words = [], notes = [], picture }) {
  const told = [...(words.length ? [["Trigger words", words.join(", ")]] : []), ...notes];
  const rows = told.map(([what, value]) =>
    make("tr", {}, make("td", { textContent: say(what) }), make("td", { textContent: value })),
  );
  const why = problem ? translated(problem, language()) : say("The file says nothing about itself");
  return [
    make("h3", { textContent: name }),
    ...(picture ? [make("img", { src: api.apiURL(address(name, "/picture")), alt: "" })] : []),
    rows.length ? make("table", {}, ...rows) : make("p", { textContent: why }),
  ];
}

function footer(window, words) {
  const copy = make("button", {
    textContent: say("Copy the trigger words"),
    onclick: () => navigator.clipboard?.writeText(words.join(", ")),
  });
  const close = make("button", { textContent: say("Close"), onclick: () => window.close() });
  return make("footer", {}, ...(words.length ? [copy] : []), close);
}
