/**
 * Names of files as this computer has them, in workflows that come from another one: what differs in slashes and
 * capitals alone is the same file, and so is what has the same SHA-256. Newer front ends would call it missing.
 */

import { app } from "../../scripts/app.js";
import { graphsOf } from "./loaders.js";
import { readRows } from "./lora_slots.js";
import { sameFile } from "./model_files.js";
import { fold } from "./names.js";
import { say } from "./words.js";

/** All that the lists of a node offer. */
function offered(type) {
  const { required = {}, optional = {} } = LiteGraph.registered_node_types[type]?.nodeData?.input ?? {};
  const lists = Object.values({ ...required, ...optional }).map(([list, options]) =>
    Array.isArray(list) ? list : (options?.options ?? []),
  );
  return [...new Set(lists.flat())].filter((name) => typeof name === "string");
}

function spelledAsHere(value, names) {
  if (typeof value !== "string" || !value || names.includes(value)) return value;
  const same = names.filter((name) => fold(name) === fold(value));
  return same.length === 1 ? same[0] : value;
}

/** Tells which files were taken for others, by what they are. */
function tell(renamed) {
  const lines = renamed.map(([was, is]) => say("{is} for {was}, the same file by its SHA-256", { is, was }));
  const summary = say("Files have other names here");
  if (lines.length) {
    app.extensionManager?.toast?.add({ severity: "info", summary, detail: lines.join("\n"), life: 12_000 });
  }
}

app.registerExtension({
  name: "Graft.Spelling",
  beforeConfigureGraph(workflow) {
    const renamed = new Map();
    for (const node of graphsOf(workflow).flatMap(({ nodes }) => nodes ?? [])) {
      if (!String(node.type).startsWith("Graft") || !Array.isArray(node.widgets_values)) continue;
      const names = offered(node.type);
      const spell = (value) => {
        const spelled = spelledAsHere(value, names);
        if (typeof spelled !== "string" || names.includes(spelled)) return spelled;
        const same = sameFile(spelled, node, names);
        if (same) renamed.set(spelled, same);
        return same ?? spelled;
      };
      node.widgets_values = node.widgets_values.map((value) => {
        const rows = typeof value === "string" && value.startsWith("[{") ? readRows(value) : [];
        return rows.length ? JSON.stringify(rows.map((row) => ({ ...row, lora: spell(row.lora) }))) : spell(value);
      });
    }
    tell([...renamed]);
  },
});
