/**
 * What Graft adds to ComfyUI's front end: the text that our nodes report, whole and readable on the node, and nodes
 * for several files with as many rows as are in use. Both live in the page alone: the values that a workflow saves and
 * what a prompt holds are the same as without this file.
 */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { translateErrors } from "./failures.js";
import { hideIf } from "./hidden.js";
import { describeFiles } from "./model_files.js";
import { dropSpareSockets, refreshRows, showRows } from "./lora_rows.js";
import { translated } from "./phrases.js";
import { language, say } from "./words.js";

const REPORTING = [
  "GraftUNETLoader", "GraftCLIPLoader", "GraftCheckpointLoader", "GraftVAELoader", "GraftControlNetLoader",
  "GraftModelPatchLoader", "GraftLoraStack", "GraftLora", "GraftInspect", "GraftSaveGGUF", "GraftSaveCLIPGGUF",
  "GraftSaveLora", "GraftTrainLora", "GraftImportance", "GraftLoadImatrix", "GraftSaveImatrix",
];
/** Whether a kind of node does, wrapped by ComfyUI-MultiGPU or not. */
const reports = (kind) => REPORTING.includes(String(kind).replace(/(?:DisTorch2)?MultiGPU$/, ""));
const TEXT = "graft_text"; // name of the widget with the text
const MOST_LINES = 14; // of a text that are seen without scrolling
/** Numbers and fields of a node's rows that may be folded; `file` is the field that makes a row one in use. */
const ROWS = {
  GraftCLIPLoader: { numbers: [2, 3, 4], fields: ["clip_name"], file: 0 },
};
const RUNS = 32; // how far back a text is looked for

/** Calls `added` after what `prototype` has under `name`, if it has anything. */
function chain(prototype, name, added) {
  const before = prototype[name];
  prototype[name] = function (...given) {
    const result = before?.apply(this, given);
    added.apply(this, given);
    return result;
  };
}

/** What each node said last, by graph and node: undo and a change of tab make every node anew. */
const said = new Map();

const keyOf = (node) => `${node.graph?.id}:${node.id}`;

const textWidget = (node) => node.widgets?.find((widget) => widget.name === TEXT);

const textOf = (output) => [output?.text ?? []].flat().join("\n");

function show(node, report) {
  const text = translated(report, language());
  const widget = textWidget(node) ?? addTextWidget(node);
  if (!widget) return;
  said.set(keyOf(node), report);
  fit(widget, node, text);
  widget.value = text;
  node.setDirtyCanvas?.(true, true);
  // a canvas makes a node taller while it draws it, which shows the next time
  requestAnimationFrame(() => requestAnimationFrame(() => node.setDirtyCanvas?.(true, true)));
}

function addTextWidget(node) {
  const widget = app.widgets?.STRING?.(node, TEXT, ["STRING", { multiline: true }], app)?.widget;
  if (!widget?.element) return undefined;
  widget.label = say("report");
  widget.serialize = false; // not in the workflow's widgets_values
  widget.options.serialize = false; // not in the prompt
  widget.options.read_only = true; // in Vue nodes, which draw a text area of their own
  widget.element.readOnly = true;
  return widget;
}

/** As tall as the text, up to MOST_LINES: on the canvas through a height, in Vue nodes through rows. */
function fit(widget, node, text) {
  const margin = widget.margin ?? 10;
  const width = node.size[0] - 2 * margin;
  const height = (lines) => heightOf(widget.element, lines, width);
  const most = height("\n".repeat(MOST_LINES - 1));
  const needed = Math.min(height(text), most) + 2 * margin + 4;
  widget.options.getMinHeight = () => needed;
  widget.options.rows = Math.min(linesOf(widget.element, text, width), MOST_LINES);
}

function heightOf(element, text, width, style = "") {
  const probe = element.cloneNode();
  probe.value = text;
  probe.style.cssText = `position: absolute; visibility: hidden; height: 0; width: ${width}px; ${style}`;
  document.body.append(probe);
  const { scrollHeight } = probe;
  probe.remove();
  return scrollHeight;
}

/** How many lines the text takes in the font of Vue nodes, beside the room that a scroll bar would have. */
function linesOf(element, text, width) {
  const height = (lines) => heightOf(element, lines, width - 45, "font-size: 12px; line-height: 16px; padding: 0");
  return Math.ceil(height(text) / 16);
}

/** The node with an id of the server's, such as "5" or "5:3" in a subgraph. */
function nodeOf(id) {
  let graph = app.graph;
  let node;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById?.(part);
    graph = node?.subgraph;
  }
  return node;
}

/** Whether a node had the same inputs, all the way up, in two prompts. */
function same(a, b, id) {
  if (a === b) return true;
  if (!a?.[id] || !b?.[id] || a[id].class_type !== b[id].class_type) return false;
  if (JSON.stringify(a[id].inputs) !== JSON.stringify(b[id].inputs)) return false;
  const links = Object.values(a[id].inputs).filter(Array.isArray);
  return links.every(([from]) => same(a, b, from));
}

/** Show what those nodes of a prompt said when they ran whose results the server had, so that they did not run now. */
async function recall({ prompt_id, nodes }) {
  const silent = nodes.filter((id) => {
    const node = nodeOf(id);
    return reports(node?.comfyClass) && !textWidget(node);
  });
  if (!silent.length) return;
  const answer = await api.fetchApi(`/history?max_items=${RUNS}`);
  const runs = Object.values(await answer.json()).reverse();
  const prompt = runs.find((run) => run.prompt[1] === prompt_id)?.prompt[2];
  for (const id of silent) {
    const run = runs.find((run) => textOf(run.outputs?.[id]) && same(prompt, run.prompt[2], id));
    const node = nodeOf(id);
    if (run && node) show(node, textOf(run.outputs[id]));
  }
}

function listen() {
  let cached;
  api.addEventListener("execution_cached", ({ detail }) => (cached = detail));
  api.addEventListener("executing", ({ detail }) => {
    if (detail || !cached) return; // no node any more: the prompt has ended and is in the history
    recall(cached).catch((error) => console.debug("Graft: no text from the history", error));
    cached = undefined;
  });
}

/** Hide rows behind the first empty one after all in use. They stay where they are in the node's list of widgets. */
function foldRows(node, { numbers, fields, file }) {
  const widgetOf = (name) => node.widgets?.find((widget) => widget.name === name);
  const rows = numbers.map((number) => fields.map((field) => widgetOf(field + number)));
  if (rows.flat().includes(undefined)) return;
  const spare = () => rows.findLastIndex((row) => isFilled(row[file]) || isLinked(node, row)) + 1;
  rows.forEach((row, index) =>
    row.forEach((widget, field) => hideIf(widget, () => index > spare(), () => rows[spare()][field])),
  );
  node.setSize?.([node.size[0], node.computeSize()[1]]);
}

const isFilled = (widget) => Boolean(widget.value) && widget.value !== "None";

const isLinked = (node, row) =>
  Boolean(node.inputs?.some((slot) => slot.link != null && row.some((widget) => widget.name === slot.widget?.name)));

const PACK = { cnr_id: "graft", ver: "0.1.0" }; // of the registry, where a recipient gets the pack

/** Tells in a saved node of ours where it and its files come from, whatever pack's node it has taken the place of. */
function sign({ properties }) {
  describeFiles(this, properties);
  if (properties.cnr_id === PACK.cnr_id) return;
  if (!/(?:^|\/)graft$/i.test(properties.aux_id ?? "")) delete properties.aux_id; // a repository, from the Manager
  Object.assign(properties, PACK);
}

/**
 * Takes inputs off a subgraph that lead to nothing any more: the front end leaves them where it puts a node of ours in
 * the place of another pack's, which had an input that ours has not.
 */
function dropDeadInputs({ graph }) {
  const isAlive = (id) => {
    const link = graph.getLink?.(id) ?? graph.links?.[id];
    return graph.getNodeById(link?.target_id)?.inputs?.[link.target_slot]?.link === id;
  };
  const dead = graph?.removeInput ? graph.inputs.filter((input) => input.linkIds.length && !input.linkIds.some(isAlive)) : [];
  dead.forEach((input) => graph.removeInput(input));
}

app.registerExtension({
  name: "Graft",
  setup() {
    translateErrors();
    listen();
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name.startsWith("Graft")) {
      chain(nodeType.prototype, "onSerialize", sign);
      chain(nodeType.prototype, "onNodeCreated", function () {
        setTimeout(() => dropDeadInputs(this)); // once it has its place
      });
    }
    if (nodeData.name === "GraftLoraStack") {
      chain(nodeType.prototype, "onNodeCreated", function () {
        showRows(this);
      });
      chain(nodeType.prototype, "onConfigure", function () {
        dropSpareSockets(this);
        refreshRows(this);
      });
      chain(nodeType.prototype, "onConnectionsChange", function () {
        refreshRows(this);
      });
    }
    if (nodeData.name in ROWS) {
      chain(nodeType.prototype, "onNodeCreated", function () {
        foldRows(this, ROWS[nodeData.name]);
      });
    }
    if (reports(nodeData.name)) {
      chain(nodeType.prototype, "onExecuted", function (output) {
        if (textOf(output)) show(this, textOf(output));
      });
    }
  },
  loadedGraphNode(node) {
    if (reports(node.comfyClass) && said.has(keyOf(node))) show(node, said.get(keyOf(node)));
  },
});
