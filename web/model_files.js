/**
 * What the files of a workflow are, so that another computer finds them: saved nodes carry each file's SHA-256, size,
 * folder and, where the file tells it, address. What is missing here is told in one message.
 */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { allNodes } from "./graphs.js";
import { MORE_ROWS, readRows } from "./lora_slots.js";
import { fold } from "./names.js";
import { say } from "./words.js";

const FILES = "graft_files"; // the property of a saved node, and the option of the loader's list with what is known
const SHOWN = 12; // digits of a hash that people see: model sites find a file by them
const NEVER = 2; // modes of a node that does not run
const BYPASSED = 4;

/** By folder and name, as our nodes list files, what they are: the server has read them. */
const known = {};

const learn = (folders) =>
  Object.entries(folders ?? {}).forEach(([folder, files]) => Object.assign((known[folder] ??= {}), files));

const FOLDERS = [
  [/^(unet|module)_name$/, "diffusion_models"],
  [/^clip_name\d$/, "text_encoders"],
  [/^lora_(name|\d+)$/, "loras"],
  [/^ckpt_name$/, "checkpoints"],
  [/^vae_name$/, "vae"],
  [/^control_net_name$/, "controlnet"],
];
const PATCHES = "GraftModelPatchLoader"; // whose one widget is called as the host's is

const folderOf = (node, { name }) =>
  node.type === PATCHES ? "model_patches" : FOLDERS.find(([names]) => names.test(name))?.[1];

const isName = (value) => typeof value === "string" && value !== "" && value !== "None";

const offeredBy = ({ options }) => (typeof options?.values === "function" ? options.values() : options?.values) ?? [];

/** The files that a node names: folder and name of each, what is listed, and whether it is used. */
function filesOf(node) {
  const widgetOf = (name) => node.widgets?.find((widget) => widget.name === name);
  const isOff = ({ name }) => name.startsWith("lora_") && widgetOf(name.replace("lora_", "enabled_"))?.value === false;
  const files = (node.widgets ?? []).map((widget) => {
    const directory = folderOf(node, widget);
    return { directory, name: widget.value, offered: directory ? offeredBy(widget) : [], off: isOff(widget) };
  });
  const offered = offeredBy(widgetOf("lora_1") ?? {});
  const more = readRows(widgetOf(MORE_ROWS)?.value).map(({ lora, on }) => ({
    directory: "loras", name: lora, offered, off: !on,
  }));
  return [...files, ...more].filter(({ directory, name }) => directory && isName(name));
}

/** What saved properties say of files; anybody may have written them. */
const saidIn = (properties) =>
  [properties?.[FILES], properties?.models]
    .flatMap((entries) => (Array.isArray(entries) ? entries : []))
    .filter((entry) => typeof entry?.name === "string" && ["string", "undefined"].includes(typeof entry.hash));

/** Tells in a saved node what its files are; of one that is missing here, what the workflow said before. */
export function describeFiles(node, properties) {
  const before = saidIn(properties);
  const entries = filesOf(node).flatMap(({ directory, name }) => {
    const file = known[directory]?.[name];
    const said = before.find((entry) => entry.name === name || (file && entry.hash === file.hash));
    if (!file) return said ? [said] : [];
    const url = file.url ?? (!said?.hash || said.hash === file.hash ? said?.url : undefined);
    return [{ name, directory, hash: file.hash, hash_type: "SHA256", size: file.size, ...(url && { url }) }];
  });
  const unique = entries.filter(({ name }, index) => entries.findIndex((entry) => entry.name === name) === index);
  // hosts check theirs strictly: each has a URL
  const models = unique.filter(({ url }) => url).map(({ size, ...model }) => model);
  for (const [property, value] of [[FILES, unique.filter(({ hash }) => hash)], ["models", models]]) {
    if (value.length) properties[property] = value;
    else delete properties[property];
  }
}

/** The file here that is the same as one that a saved node names, by what the node says of it. */
export function sameFile(name, { properties }, offered) {
  const said = saidIn(properties).find((entry) => entry.name === name && entry.hash);
  if (!said) return undefined;
  const hash = said.hash.toLowerCase();
  const files = Object.entries(known[said.directory] ?? {}).filter(([file]) => offered.includes(file));
  return files.find(([, file]) => file.hash.startsWith(hash))?.[0];
}

/** Whether a list has what the server takes for a name: the same, or one file alone that is called so elsewhere. */
function isHere(name, offered) {
  const base = (file) => fold(file).split("/").at(-1);
  return offered.includes(name) || offered.filter((file) => base(file) === base(name)).length === 1;
}

/** Whether a node runs without files that are missing, by its own choice. */
const skips = (node) => node.widgets?.some(({ name, value }) => name === "if_missing" && value === "skip");

function missingFiles() {
  const runs = ({ mode }) => mode !== NEVER && mode !== BYPASSED;
  const ours = allNodes().filter((node) => String(node.type).startsWith("Graft") && runs(node));
  const missing = ours.filter((node) => !skips(node)).flatMap((node) =>
    filesOf(node)
      .filter(({ name, offered, off }) => !off && !isHere(name, offered))
      .map(({ directory, name }) => ({ directory, ...saidIn(node.properties).find((entry) => entry.name === name), name })),
  );
  return [...new Map(missing.map((file) => [`${file.directory}/${file.name}`, file])).values()];
}

const described = ({ name, directory, hash, url }) =>
  [name, hash && `SHA-256 ${hash.slice(0, SHOWN)}`, say("into models/{directory}", { directory }), url]
    .filter(Boolean)
    .join(", ");

let told = "";

function tellMissing() {
  const missing = missingFiles();
  const detail = missing.map(described).join("\n");
  if (detail && detail !== told) {
    const count = missing.length;
    const summary =
      count === 1 ? say("A file of this workflow is missing") : say("{count} files of this workflow are missing", { count });
    app.extensionManager?.toast?.add({ severity: "warn", summary, detail });
  }
  told = detail;
}

app.registerExtension({
  name: "Graft.ModelFiles",
  setup() {
    api.addEventListener("graft.files", ({ detail }) => learn(detail));
  },
  beforeRegisterNodeDef(nodeType, { name, input }) {
    if (name === "GraftUNETLoader") learn(input?.required?.unet_name?.[1]?.[FILES]);
  },
  afterConfigureGraph: tellMissing,
});
