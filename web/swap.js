/**
 * One click in, and back: menu entries that put our loaders in the place of others, of one node or of the whole
 * workflow. The page saves the workflow, `loaders.js` changes that, and the page opens it as it does for undo.
 */

import { app } from "../../scripts/app.js";
import { allNodes, rootOf } from "./graphs.js";
import { aligned, groupOf, isOurs, loaderOf, useOurs, useTheirs } from "./loaders.js";
import { say } from "./words.js";

const USE = "Use GGUF (Graft)";
const USE_ALL = "Use GGUF (Graft) in the whole workflow";
const BACK = "Back from Graft's loader";
const BACK_ALL = "Back from all of Graft's loaders";
const FILE_INPUTS = ["unet_name", "clip_name", "clip_name1", "gguf_name", "model_name"];

/** The page's own graph of one in a saved workflow. */
const liveGraph = (graph, workflow) => (graph === workflow ? rootOf() : rootOf().subgraphs?.get(graph.id));

/** What a node lists under the first of its inputs that names a file. */
function filesOf(type) {
  const { required = {}, optional = {} } = LiteGraph.registered_node_types[type]?.nodeData?.input ?? {};
  const inputs = { ...required, ...optional };
  const [list, options] = inputs[FILE_INPUTS.find((name) => inputs[name])] ?? [];
  return Array.isArray(list) ? list : (options?.options ?? []);
}

/** Names of a node's widgets, one for each of its saved values; of a node that is missing here they are not known. */
function widgetsOf(workflow) {
  const isHere = (type) => type in LiteGraph.registered_node_types;
  return (graph, { id, type }) =>
    isHere(type) ? liveGraph(graph, workflow)?.getNodeById(id)?.widgets?.map(({ name }) => name) : undefined;
}

/** Changes the workflow by `act`; `only` is the one node that is meant, of the page's. */
async function swap(act, only) {
  const before = aligned(JSON.parse(JSON.stringify(rootOf().serialize()))); // with group nodes it is no plain data
  const workflow = structuredClone(before);
  const wanted = only && ((graph, { id }) => liveGraph(graph, workflow)?.getNodeById(id) === only);
  const files = new Proxy({}, { get: (_, type) => filesOf(type) });
  const done = act(workflow, files, wanted, widgetsOf(workflow));
  const changed = done.filter(({ left }) => !left);
  if (changed.length) await open(workflow, before);
  tell(done);
}

/** Opens a changed workflow in place of the one that is open, so that undo goes back to that. */
async function open(workflow, before) {
  const active = app.extensionManager?.workflow?.activeWorkflow ?? null;
  const tracker = active?.changeTracker;
  const saved = tracker?.initialState;
  const seen = app.canvas.graph?.id;
  await app.loadGraphData(workflow, false, false, active);
  const inner = rootOf().subgraphs?.get(seen);
  if (inner && app.canvas.graph !== inner) app.canvas.setGraph(inner);
  if (!tracker) return;
  // to the page it is a workflow that was opened; it is a step in the one that was open
  tracker.initialState = saved;
  tracker.undoQueue.push(before);
  tracker.redoQueue.length = 0;
  tracker.updateModified?.();
}

/** Tells which files were chosen, and what has no equal in Graft. */
function tell(done) {
  const lines = done.flatMap(({ node, files = [], lost = [], left, group }) => [
    ...(left && !group ? [say("left as it is: there is no GGUF with a name like {names}", { names: left })] : []),
    ...(group ? [say("left as it is: choose Convert to nodes on the group node {name} first", { name: left })] : []),
    ...files.filter(({ was, is, found }) => !found || was !== is).map(({ was, is, found }) =>
      found
        ? say("{is} for {was}", { is, was })
        : say("choose a file on node {id}: there is none with a name like {was}", { id: node.id, was }),
    ),
    ...lost.map((choice) => say("not taken along: {choice}", { choice })),
  ]);
  const changed = done.filter(({ left }) => !left).length;
  const count = changed === 1 ? "1 loader changed, Ctrl+Z undoes it" : "{changed} loaders changed, Ctrl+Z undoes it";
  const summary = changed ? say(count, { changed }) : say("No change");
  const severity = done.some(({ left, files = [] }) => left || files.some(({ found }) => !found)) ? "warn" : "success";
  app.extensionManager?.toast?.add({ severity, summary, detail: lines.join("\n"), life: 12_000 });
}

/** Whether any node of the workflow, in subgraphs and group nodes too, is of a kind. */
function anyNode(is) {
  const groups = rootOf().extra?.groupNodes ?? {};
  return allNodes().some(({ type }) => is(type) || groups[groupOf(type)]?.nodes.some((inner) => is(inner.type)));
}

const entry = (text, act, only) => ({ content: say(text), callback: () => swap(act, only) });

function nodeEntries(node) {
  if (loaderOf(node.type)) return [null, entry(USE, useOurs, node), entry(USE_ALL, useOurs)];
  return isOurs(node.type) ? [null, entry(BACK, useTheirs, node)] : [];
}

function canvasEntries() {
  const all = [anyNode(loaderOf) && entry(USE_ALL, useOurs), anyNode(isOurs) && entry(BACK_ALL, useTheirs)];
  const entries = all.filter(Boolean);
  return entries.length ? [null, ...entries] : [];
}

/** Older front ends ask no extension for entries of a menu: there they are added to what the canvas offers. */
function addEntries() {
  if (app.collectNodeMenuItems) return;
  const canvas = LGraphCanvas.prototype;
  const { getNodeMenuOptions, getCanvasMenuOptions } = canvas;
  canvas.getNodeMenuOptions = function (node) {
    return [...getNodeMenuOptions.call(this, node), ...nodeEntries(node)];
  };
  canvas.getCanvasMenuOptions = function () {
    return [...getCanvasMenuOptions.call(this), ...canvasEntries()];
  };
}

app.registerExtension({
  name: "Graft.Swap",
  setup: addEntries,
  getNodeMenuItems: nodeEntries,
  getCanvasMenuItems: canvasEntries,
  commands: [
    { id: "Graft.UseGGUF", label: USE_ALL, icon: "pi pi-bolt", function: () => swap(useOurs) },
    { id: "Graft.Back", label: BACK_ALL, icon: "pi pi-undo", function: () => swap(useTheirs) },
  ],
});

