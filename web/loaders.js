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
 * @returns for each node that was meant: the two files' names, and what was lost; the names alone where no GGUF is near;
 *   its name alone where it is a group node with a loader in it.
 */
export function useOurs(workflow, filesOf, wanted, widgetsOf = () => undefined) {
  const done = wanted ? [] : inGroupNodes(workflow, loaderOf);
  forEachNode(workflow, wanted, (graph, node) => {
    const loader = loaderOf(node.type);
    if (!loader) return;
    const names = widgetsOf(graph, node) ?? loader.widgets;
    const values = { ...valuesOf(node, names), ...valuesOutside(workflow, graph, node) };
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
    const outside = {};
    change(workflow, graph, node, loader.ours, loader.kept, Object.values(set), (name) => {
      const chosen = choose(name);
      if (chosen !== undefined && chosen !== name) outside[chosen] ??= name;
      return chosen;
    });
    if (Object.keys(outside).length) was.outside = outside;
    node.properties = { ...omit(node.properties, ORIGIN), "Node name for S&R": loader.ours, [WAS]: was };
    done.push(report);
  });
  return done;
}

/** Puts back what our loaders took the place of, or ComfyUI's own; returns the same as `useOurs`. */
export function useTheirs(workflow, filesOf, wanted) {
  const done = wanted ? [] : inGroupNodes(workflow, isOurs);
  forEachNode(workflow, wanted, (graph, node) => {
    if (!isOurs(node.type)) return;
    const values = valuesOf(node, Object.keys(OURS[node.type]));
    const was = node.properties?.[WAS] ?? { type: stockFor(node.type, values) };
    const loader = loaderOf(was.type);
    const theirs = [...(was.values ?? [])];
    // of a node that was saved without its last widgets, none is made up
    const names = (was.names ?? loader.widgets).slice(0, theirs.length || undefined);
    const kept = Object.fromEntries(Object.entries(loader.kept).map(([name, own]) => [own, name]));
    const choose = (name) => nearest(name, filesOf[was.type] ?? [], () => true);
    const chooseOutside = (name) => was.outside?.[name] ?? choose(name);
    const files = [];
    names.forEach((name, index) => {
      const own = loader.kept[name];
      if (own && !isFile(own) && own !== "device") theirs[index] = values[own];
      if (theirs[index] !== undefined) return;
      theirs[index] = own ? values[own] : "default";
      if (!isFile(own)) return;
      theirs[index] = choose(values[own]) ?? values[own];
      files.push({ was: values[own], is: theirs[index], found: choose(values[own]) !== undefined });
    });
    change(workflow, graph, node, was.type, kept, theirs, chooseOutside);
    node.properties = { ...omit(node.properties, [...ORIGIN, WAS]), ...pick(was, ORIGIN) };
    node.properties["Node name for S&R"] = was.type;
    done.push({ node, files, lost: [] });
  });
  return done;
}

/** What a group node is called, as older front ends made them; undefined of any other type of nodes. */
export const groupOf = (type) => /^workflow[/>](.+)$/.exec(type)?.[1];

/** Group nodes with such nodes in them: left as they are, since what they hold is kept apart from the workflow's nodes. */
function inGroupNodes(workflow, is) {
  const nodes = graphsOf(workflow).flatMap((graph) => graph.nodes ?? []);
  const held = (node) => workflow.extra?.groupNodes?.[groupOf(node.type)]?.nodes ?? [];
  const found = nodes.filter((node) => held(node).some(({ type }) => is(type)));
  return found.map((node) => ({ node, left: groupOf(node.type), group: true }));
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
  const isFileSlot = (slot) => [nameOf(slot), kept[nameOf(slot)]].some(isFile) || undefined;
  const files = inputsOutside(graph, inputs, isFileSlot);
  for (const slot of inputs.filter((slot) => !kept[nameOf(slot)])) unlink(workflow, graph, slot.link);
  node.inputs = inputs.filter((slot) => kept[nameOf(slot)]).map((slot) => renamed(slot, kept[nameOf(slot)]));
  node.inputs.forEach((slot, index) => setTarget(graph, slot.link, index));
  changePromoted(workflow, graph, node.id, (name) => kept[name], choose, files);
}

const nameOf = (slot) => slot.widget?.name ?? slot.name;

const renamed = ({ localized_name, ...slot }, name) => ({ ...slot, name, ...(slot.widget && { widget: { name } }) });

/**
 * Widgets that a subgraph's nodes show of a node in it: under new names, of files the nearest ones, others gone.
 *
 * @param become the new name of a widget of the node; undefined if it is gone.
 * @param files whether an input of the subgraph, by its name, is the file of the node.
 */
function changePromoted(workflow, graph, id, become, choose, files) {
  for (const [outer, node] of instancesOf(workflow, graph)) {
    const shown = rowsOf(node) ?? [];
    const after = shown.flatMap(({ entry, value }) => {
      const [of, name, ...more] = entry;
      const own = String(of) === String(id);
      if (own && !become(name)) return [];
      const file = own ? [name, become(name)].some(isFile) : String(of) === BY_INPUT && files[name];
      const chosen = file && typeof value === "string" ? (choose(value) ?? value) : value;
      return [{ entry: own ? [of, become(name), ...more] : entry, value: chosen }];
    });
    if (shown.length) showRows(node, shown, after);
    valuedInputs(node).forEach((name, index) => {
      const value = node.widgets_values[index];
      if (files[name] && typeof value === "string") node.widgets_values[index] = choose(value) ?? value;
    });
    // a subgraph's node in another subgraph shows them further
    if (outer === workflow) continue;
    const changed = shown.filter(({ entry: [of] }) => String(of) === String(id)).map(({ entry: [, name] }) => name);
    const inputs = (graph.inputs ?? []).map(({ name }) => name);
    const further = (name) => (changed.includes(name) && !inputs.includes(name) ? become(name) : name);
    const beyond = inputsOutside(outer, node.inputs ?? [], ({ name }) => files[name]);
    changePromoted(workflow, outer, node.id, further, choose, beyond);
  }
}

const BY_INPUT = "-1"; // in place of a node's id, where the widget is that of an input of the subgraph

/** Of a subgraph's inputs those that slots of a node hang on: what `tell` says of the slot, by the input's name. */
function inputsOutside(graph, slots, tell) {
  const found = {};
  for (const slot of slots) {
    const link = slot.link == null ? undefined : findLink(graph, slot.link);
    if (!link || linkOf(link).origin !== INPUTS || tell(slot) === undefined) continue;
    const input = graph.inputs?.[linkOf(link).from];
    if (input) found[input.name] = tell(slot);
  }
  return found;
}

/** The widgets that a subgraph's node shows, with their values where it has them; undefined if it shows none. */
function rowsOf({ properties, widgets_values: given }) {
  const shown = properties?.proxyWidgets;
  if (!Array.isArray(shown)) return undefined;
  // either all have a value here, or only those of the subgraph's inputs, the others having theirs within
  const byInput = shown.filter(([of]) => String(of) === BY_INPUT);
  const valued = [shown, byInput].find((entries) => entries.length && entries.length === given?.length) ?? [];
  return shown.map((entry) => ({ entry, value: given?.[valued.indexOf(entry)] }));
}

function showRows(node, before, rows) {
  node.properties.proxyWidgets = rows.map(({ entry }) => entry);
  const isHere = ({ value }) => value !== undefined;
  if (before.some(isHere)) node.widgets_values = rows.filter(isHere).map(({ value }) => value);
}

/** The inputs of a subgraph's node whose values it has, in their order, as older front ends save them. */
function valuedInputs(node) {
  const names = (node.inputs ?? []).filter(({ widget }) => widget).map(({ name }) => name);
  const elsewhere = (rowsOf(node) ?? []).some(({ value }) => value !== undefined);
  return !elsewhere && names.length === node.widgets_values?.length ? names : [];
}

/** Values of a node's widgets that the node of its subgraph has, and not itself. */
function valuesOutside(workflow, graph, node) {
  const found = {};
  const seek = (within, slots, tell) => {
    const outside = inputsOutside(within, slots, tell);
    if (!Object.keys(outside).length) return;
    for (const [outer, instance] of instancesOf(workflow, within)) {
      for (const { entry, value } of rowsOf(instance) ?? []) {
        const name = String(entry[0]) === BY_INPUT ? outside[entry[1]] : undefined;
        if (name !== undefined && value !== undefined) found[name] = value;
      }
      valuedInputs(instance).forEach((name, index) => {
        if (outside[name] !== undefined) found[outside[name]] = instance.widgets_values[index];
      });
      seek(outer, instance.inputs ?? [], ({ name }) => outside[name]);
    }
  };
  seek(graph, node.inputs ?? [], nameOf);
  return found;
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

/** Lets links end where the slots are that hold them: of nodes of missing packs older front ends lose unlinked ones. */
export function aligned(workflow) {
  for (const graph of graphsOf(workflow)) {
    for (const { inputs } of graph.nodes ?? []) inputs?.forEach((slot, index) => setTarget(graph, slot.link, index));
  }
  return workflow;
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
    const valued = valuedInputs(node).indexOf(name);
    if (valued >= 0) node.widgets_values.splice(valued, 1);
    const shown = rowsOf(node) ?? [];
    const left = shown.filter(({ entry: [of, input] }) => String(of) !== BY_INPUT || input !== name);
    if (left.length < shown.length) showRows(node, shown, left);
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
