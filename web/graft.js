/**
 * What Graft adds to ComfyUI's front end: the text that our nodes report, whole and readable on the node, and nodes
 * for several files with as many rows as are in use. Both live in the page alone: what a workflow saves and what a
 * prompt holds are the same as without this file.
 */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const REPORTING = ["GraftUNETLoader", "GraftCLIPLoader", "GraftLoraStack", "GraftInspect"];
const TEXT = "graft_text"; // name of the widget with the text
const MOST_LINES = 14; // of a text that are seen without scrolling
/** Numbers and fields of a node's rows that may be folded; `file` is the field that makes a row one in use. */
const ROWS = {
  GraftLoraStack: { numbers: [1, 2, 3, 4, 5, 6, 7, 8], fields: ["enabled_", "lora_", "strength_"], file: 1 },
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

function show(node, text) {
  const widget = textWidget(node) ?? addTextWidget(node);
  if (!widget) return;
  said.set(keyOf(node), text);
  fit(widget, node, text);
  widget.value = text;
  node.setDirtyCanvas?.(true, true);
  // a canvas makes a node taller while it draws it, which shows the next time
  requestAnimationFrame(() => requestAnimationFrame(() => node.setDirtyCanvas?.(true, true)));
}

function addTextWidget(node) {
  const widget = app.widgets?.STRING?.(node, TEXT, ["STRING", { multiline: true }], app)?.widget;
  if (!widget?.element) return undefined;
  widget.label = "report";
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

/** How many lines the text takes in the font of Vue nodes. */
function linesOf(element, text, width) {
  const height = (lines) => heightOf(element, lines, width - 30, "font-size: 12px; line-height: 16px; padding: 0");
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
    return REPORTING.includes(node?.comfyClass) && !textWidget(node);
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

/**
 * `hidden` is asked for whenever a node is drawn, so it is worked out then, and nothing has to be kept up to date.
 * `last` is the widget of the last row that is seen: the end that a link could have at a hidden one is drawn there.
 */
function hideIf(widget, isHidden, last) {
  let { y } = widget;
  const place = { get: () => (isHidden() ? last().y : y), set: (given) => (y = given) };
  Object.defineProperty(widget, "y", { configurable: true, enumerable: true, ...place });
  property(widget, "hidden", isHidden);
  // canvases that reserve the space of hidden widgets: 4 is what they add to a widget's height
  property(widget, "computeSize", () => (isHidden() ? () => [0, -4] : undefined));
  // Vue nodes look here. Those without a reactive state never look again, and show all rows
  if ("_state" in widget) property(widget.options, "hidden", isHidden);
}

/** A property that is `value()`, or else what someone has set it to. */
function property(object, name, value) {
  let own = object[name];
  Object.defineProperty(object, name, {
    configurable: true,
    enumerable: true,
    get: () => value() || own,
    set: (given) => (own = given),
  });
}

app.registerExtension({
  name: "Graft",
  setup: listen,
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name in ROWS) {
      chain(nodeType.prototype, "onNodeCreated", function () {
        foldRows(this, ROWS[nodeData.name]);
      });
    }
    if (REPORTING.includes(nodeData.name)) {
      chain(nodeType.prototype, "onExecuted", function (output) {
        if (textOf(output)) show(this, textOf(output));
      });
    }
  },
  loadedGraphNode(node) {
    if (REPORTING.includes(node.comfyClass) && said.has(keyOf(node))) show(node, said.get(keyOf(node)));
  },
});
