/** Rows of LoRA Stack under a name: JSON files in the user's folder of ComfyUI, `graft/lora_presets/NAME.json`. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { readRows } from "./lora_slots.js";
import { menu, toast } from "./parts.js";
import { say } from "./words.js";

const FOLDER = "graft/lora_presets";
const UNFIT = /[\\/:*?"<>|\u0000-\u001f]/g; // in names of files, on some system

const fileOf = (name) => `${FOLDER}/${name}.json`;

const asked = (kind, title, message) => app.extensionManager.dialog[kind]({ title, message, defaultValue: "" });

async function names() {
  const files = await api.listUserDataFullInfo(FOLDER);
  return files.map(({ path }) => path.replaceAll("\\", "/").split("/").at(-1)).filter((file) => file.endsWith(".json"))
    .map((file) => file.slice(0, -".json".length)).sort();
}

/** Asks for a name and saves `rows`, as `[{on, lora, strength, strength_clip}]`. */
export async function savePreset(rows) {
  const title = say("Save the rows as a preset");
  const given = await asked("prompt", title, say("Name of the preset"));
  const name = String(given ?? "").replace(UNFIT, "_").trim().slice(0, 80);
  if (!name) return;
  const isThere = (await names()).includes(name);
  if (isThere && !(await asked("confirm", title, say("Replace the preset {name}?", { name })))) return;
  await api.storeUserData(fileOf(name), JSON.stringify(rows, null, 1), { overwrite: true, stringify: false, throwOnError: true });
  toast("success", say("Preset saved: {name}", { name }));
}

/** Calls `chosen` with the name of a preset that is chosen from the list. */
async function choose(event, chosen) {
  const found = await names();
  menu(event, found.length ? found : [say("no preset yet")], (index) => found.length && chosen(found[index]));
}

/** Calls `taken` with the rows of a preset that is chosen from the list. */
export function loadPreset(event, taken) {
  return choose(event, async (name) => {
    const answer = await api.getUserData(fileOf(name));
    const rows = answer.ok ? readRows(await answer.text()) : [];
    if (rows.length) taken(rows);
    else toast("warn", say("The preset cannot be read: {name}", { name }));
  });
}

export function deletePreset(event) {
  return choose(event, async (name) => {
    const message = say("Delete the preset {name}?", { name });
    if (await asked("confirm", say("Delete a preset"), message)) await api.deleteUserData(fileOf(name));
  });
}
