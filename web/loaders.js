/**
 * Loaders of ComfyUI and of other packs, and ours in their place: in a workflow as it is saved, without a front end.
 * Ids, links, positions and titles stay; what a loader was is kept with the node, so that it can be put back.
 * `ops/workflows/swap.py` does the same without a page.
 */

import { isGGUF, nearest } from "./names.js";
import { TABLE } from "./table.js";

/** Our widgets in their order, with what they are when nobody has chosen. */
export const OURS = TABLE.ours;

const { stock: STOCK, meaningless: MEANINGLESS, origin: ORIGIN } = TABLE;
const WRAPPER = new RegExp(TABLE.wrapper);
const WAS = "graft_was"; // the property under which a node keeps what it was

/** By the name of the node: its widgets in their order, those that ours has too, and what ours is set to. */
const LOADERS = Object.fromEntries(TABLE.theirs.flatMap(({ names, ...loader }) => names.map((name) => [name, loader])));

/** What a kind of node is among the loaders, wrapped by ComfyUI-MultiGPU or not; undefined if it is none. */
export const loaderOf = (type) => LOADERS[String(type).replace(WRAPPER, "")];

export const isOurs = (type) => type in OURS;

/** All graphs of a workflow: itself, and the definitions of its subgraphs. */
export const graphsOf = (workflow) => [workflow, ...(workflow.definitions?.subgraphs ?? [])];

/**
 * Puts our loaders in the place of others.
 *
 * @param workflow as it is saved; it is changed.
 * @param filesOf what our loaders list, by their names.
 * @param wanted whether a node of a graph is meant; without it all are for which there is a GGUF.
 * @param widgetsOf names of a node's widgets in their order, where the page knows them.
 * @returns for each node that was meant: the two files' names, and what was lost; the names alone where no GGUF is near.
 */
export function useOurs(workflow, filesOf, wanted, widgetsOf = () => undefined) {
  const done = [];
  forEachNode(workflow, wanted, (graph, node) => {
    const loader = loaderOf(node.type);
    if (!loader) return;
    const names = widgetsOf(graph, node) ?? loader.widgets;
    const values = valuesOf(node, names);
    const choose = (name) => nearest(name, filesOf[loader.ours]);
    const named = Object.keys(loader.kept).filter((name) => isFile(loader.kept[name]) && !isNone(values[name]));
    if (!wanted && !named.some((name) => isGGUF(values[name]) || isGGUF(choose(values[name]) ?? ""))) {
      done.push({ node, left: named.map((name) => values[name]).join(", ") || node.type });
      return;
    }
    const set = { ...OURS[loader.ours], ...loader.set };
    const report = { node, files: [], lost: [] };
    for (const [name, value] of Object.entries(values)) {
      const own = loader.kept[name];
      if (named.includes(name)) {
        set[own] = choose(value) ?? value;
        report.files.push({ was: value, is: set[own], found: choose(value) !== undefined });
      } else if (own === "device") set.device = value === "cpu" ? "cpu" : "default";
      else if (own && !isFile(own)) set[own] = value;
      if (isLost(name, own, value)) report.lost.push(`${name} ${value}`);
    }
    const was = { type: node.type, names, values: valuesInOrder(values, node), ...pick(node.properties, ORIGIN) };
    change(workflow, graph, node, loader.ours, loader.kept, Object.values(set), choose);
    node.properties = { ...omit(node.properties, ORIGIN), "Node name for S&R": loader.ours, [WAS]: was };
    done.push(report);
  });
  return done;
}

/** Puts back what our loaders took the place of, or ComfyUI's own; returns the same as `useOurs`. */
export function useTheirs(workflow, filesOf, wanted) {
  const done = [];
  forEachNode(workflow, wanted, (graph, node) => {
    if (!isOurs(node.type)) return;
    const values = valuesOf(node, Object.keys(OURS[node.type]));
    const was = node.properties?.[WAS] ?? { type: stockFor(node.type, values) };
    const loader = loaderOf(was.type);
    const names = was.names ?? loader.widgets;
    const kept = Object.fromEntries(Object.entries(loader.kept).map(([theirs, own]) => [own, theirs]));
    const choose = (name) => nearest(name, filesOf[was.type] ?? [], () => true);
    const files = [];
    const theirs = [...(was.values ?? [])];
    names.forEach((name, index) => {
      const own = loader.kept[name];
      if (own && !isFile(own) && own !== "device") theirs[index] = values[own];
      if (theirs[index] !== undefined) return;
      theirs[index] = own ? values[own] : "default";
      if (!isFile(own)) return;
      theirs[index] = choose(values[own]) ?? values[own];
      files.push({ was: values[own], is: theirs[index], found: choose(values[own]) !== undefined });
    });
    change(workflow, graph, node, was.type, kept, theirs, choose);
    node.properties = { ...omit(node.properties, [...ORIGIN, WAS]), ...pick(was, ORIGIN) };
    node.properties["Node name for S&R"] = was.type;
    done.push({ node, files, lost: [] });
  });
  return done;
}

const isFile = (own) => ["unet_name", "module_name"].includes(own) || Boolean(own?.startsWith("clip_name"));

const isNone = (name) => typeof name !== "string" || ["", "none"].includes(name.toLowerCase());

const WITHOUT_MEANING = ["default", "none", "target", "", false, undefined, null];

/** Whether a choice has no equal here. What Graft decodes to, and LoRAs in, is fp32 whatever others offer. */
function isLost(name, own, value) {
  if (MEANINGLESS.includes(name) || WITHOUT_MEANING.includes(value)) return false;
  return own === "device" ? value !== "cpu" : !own;
}

function stockFor(type, values) {
  const files = Object.keys(values).filter((name) => isFile(name) && !isNone(values[name])).length;
  return STOCK[type][Math.min(Math.max(files, 1), STOCK[type].length) - 1];
}

function forEachNode(workflow, wanted, act) {
  for (const graph of graphsOf(workflow)) {
    for (const node of graph.nodes ?? []) if (wanted?.(graph, node) ?? true) act(graph, node);
  }
}

function valuesOf(node, names) {
  const given = node.widgets_values ?? [];
  if (!Array.isArray(given)) return { ...given };
  return Object.fromEntries(names.map((name, index) => [name, given[index]]));
}

const valuesInOrder = (values, { widgets_values: given }) => (Array.isArray(given) ? given : Object.values(values));

/** Makes a node one of another type, with its inputs under the other's names and links of those only. */
function change(workflow, graph, node, type, kept, values, choose) {
  if (node.title === node.type) delete node.title;
  node.type = type;
  node.widgets_values = values;
  const inputs = node.inputs ?? [];
  for (const slot of inputs.filter((slot) => !kept[nameOf(slot)])) unlink(workflow, graph, slot.link);
  node.inputs = inputs.filter((slot) => kept[nameOf(slot)]).map((slot) => renamed(slot, kept[nameOf(slot)]));
  node.inputs.forEach((slot, index) => setTarget(graph, slot.link, index));
  changePromoted(workflow, graph, node.id, kept, choose);
}

const nameOf = (slot) => slot.widget?.name ?? slot.name;

const renamed = ({ localized_name, ...slot }, name) => ({ ...slot, name, ...(slot.widget && { widget: { name } }) });

/** Widgets that a subgraph's nodes show of a node in it: under new names, of files the nearest ones, others gone. */
function changePromoted(workflow, graph, id, kept, choose) {
  for (const [outer, node] of instancesOf(workflow, graph)) {
    const shown = node.properties?.proxyWidgets;
    if (!Array.isArray(shown)) continue;
    const values = node.widgets_values?.length === shown.length ? node.widgets_values : undefined;
    const rows = shown.map((entry, index) => ({ entry, value: values?.[index] }));
    const after = rows.flatMap(({ entry: [of, name, ...more], value }) => {
      if (String(of) !== String(id)) return [{ entry: [of, name, ...more], value }];
      if (!kept[name]) return [];
      const file = [name, kept[name]].some(isFile) && typeof value === "string";
      return [{ entry: [of, kept[name], ...more], value: file ? (choose(value) ?? value) : value }];
    });
    node.properties.proxyWidgets = after.map(({ entry }) => entry);
    if (values) node.widgets_values = after.map(({ value }) => value);
    // a subgraph's node in another subgraph shows them further
    const inputs = new Set((graph.inputs ?? []).map(({ name }) => name));
    const further = Object.fromEntries(shown.map(([, name]) => [name, inputs.has(name) ? name : (kept[name] ?? name)]));
    if (outer !== workflow) changePromoted(workflow, outer, node.id, further, choose);
  }
}

/** The nodes that stand for a subgraph, each with the graph that it is in. */
const instancesOf = (workflow, graph) =>
  graphsOf(workflow).flatMap((outer) =>
    (outer.nodes ?? []).filter((node) => node.type === graph.id).map((node) => [outer, node]),
  );

const INPUTS = -10; // the id of a subgraph's inputs where a link begins

const linkOf = (link) =>
  Array.isArray(link)
    ? { id: link[0], origin: link[1], from: link[2], target: link[3], to: link[4] }
    : { id: link.id, origin: link.origin_id, from: link.origin_slot, target: link.target_id, to: link.target_slot };

const findLink = (graph, id) => (graph.links ?? []).find((link) => linkOf(link).id === id);

function setTarget(graph, id, slot) {
  const link = id == null ? undefined : findLink(graph, id);
  if (link) link[Array.isArray(link) ? 4 : "target_slot"] = slot;
}

/** Takes a link out; an input of a subgraph that then leads nowhere goes with it. */
function unlink(workflow, graph, id) {
  const link = id == null ? undefined : findLink(graph, id);
  if (!link) return;
  graph.links.splice(graph.links.indexOf(link), 1);
  const { origin, from } = linkOf(link);
  if (origin !== INPUTS) {
    const output = graph.nodes.find((node) => node.id === origin)?.outputs?.[from];
    if (output?.links) output.links = output.links.filter((other) => other !== id);
    return;
  }
  const input = graph.inputs[from];
  input.linkIds = (input.linkIds ?? []).filter((other) => other !== id);
  if (!input.linkIds.length) removeInput(workflow, graph, from);
}

function removeInput(workflow, graph, index) {
  const [{ name }] = graph.inputs.splice(index, 1);
  for (const link of graph.links) {
    const { origin, from } = linkOf(link);
    if (origin === INPUTS && from > index) link[Array.isArray(link) ? 2 : "origin_slot"] = from - 1;
  }
  for (const [outer, node] of instancesOf(workflow, graph)) {
    const slot = (node.inputs ?? []).find((slot) => slot.name === name);
    if (!slot) continue;
    node.inputs.splice(node.inputs.indexOf(slot), 1);
    unlink(workflow, outer, slot.link);
    node.inputs.forEach((other, place) => setTarget(outer, other.link, place));
  }
}

const pick = (object, names) =>
  Object.fromEntries(names.filter((name) => object?.[name] !== undefined).map((name) => [name, object[name]]));

const omit = (object, names) => Object.fromEntries(Object.entries(object ?? {}).filter(([name]) => !names.includes(name)));
