/** Pieces of a page: elements, and the front end's own menu. */

import { app } from "../../scripts/app.js";

export function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** Put a style sheet into the page, once. */
export function style(id, text) {
  if (!document.getElementById(id)) document.head.append(make("style", { id, textContent: text }));
}

/** The front end's own menu, which has a field to search in; `chosen` is called with the entry's index. */
export function menu(event, entries, chosen) {
  const { root } = new LiteGraph.ContextMenu(
    entries.map((text, index) => ({ content: escaped(text), index })),
    {
      event,
      className: "dark",
      scale: Math.max(1, app.canvas?.ds?.scale ?? 1),
      callback: ({ index }) => chosen(index),
    },
  );
  // older ones read an entry as HTML and newer ones as text, and names of files may hold anything
  root.querySelectorAll(".litemenu-entry").forEach((entry, index) => (entry.textContent = entries[index]));
}

const escaped = (text) => text.replace(/[&<>]/g, (mark) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[mark]);

export function toast(severity, summary) {
  app.extensionManager?.toast?.add({ severity, summary, life: 5_000 });
}
