/**
 * Where the rows of LoRA Stack are kept: the first ones in widgets of their own, all others in the text of one widget.
 * Both are what a workflow saves and a prompt sends, so that it runs the same without this file.
 */

import { app } from "../../scripts/app.js";
import { say } from "./words.js";

const WIDGETS = [1, 2, 3, 4, 5, 6, 7, 8];
const FIELDS = ["enabled_", "lora_", "strength_"];
const WHEN = "GRAFT_STRENGTH";
export const NONE = "None";
export const MORE_ROWS = "more_rows"; // the widget with that text, JSON
const EMPTY = { on: true, lora: NONE, strength: 1 };

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);

export const isLinked = (node, widgets) =>
  Boolean(node.inputs?.some((slot) => slot.link != null && widgets.some((widget) => widget.name === slot.widget?.name)));

/** Give a widget a value as a person does. */
export function set(node, widget, value) {
  widget.value = value;
  widget.callback?.(value, app.canvas, node);
}

/**
 * A row by its number. Its `values` are `{on, lora, strength}`, and `strength_clip` where that is another one, as a
 * preset and the text of the rows behind the first ones have them.
 */
class Slot {
  constructor(node, number) {
    Object.assign(this, { node, number, widgets: [] });
  }

  /** Whether it is seen as its widgets: one of them takes its value from a link. */
  isPlain() {
    return isLinked(this.node, this.widgets);
  }

  isUsed() {
    return Boolean(this.values.lora) && this.values.lora !== NONE;
  }

  change(part) {
    this.values = { ...this.values, ...part };
  }

  get socket() {
    return this.node.inputs?.findIndex((slot) => slot.name === `when_${this.number}`) ?? -1;
  }

  /** The output that says where and when it works, as `[node, slot]`. */
  get origin() {
    const { graph } = this.node;
    const id = this.node.inputs[this.socket]?.link;
    const link = graph?.getLink?.(id) ?? graph?.links?.[id];
    return link ? [graph.getNodeById(link.origin_id), link.origin_slot] : undefined;
  }

  openSocket(origin) {
    if (this.socket < 0) {
      this.node.addInput(`when_${this.number}`, WHEN, { label: say("where and when, row {row}", { row: this.number }) });
    }
    if (origin) origin[0].connect(origin[1], this.node, this.socket);
  }

  closeSocket() {
    if (this.socket >= 0) this.node.removeInput(this.socket);
  }
}

class WidgetSlot extends Slot {
  constructor(node, number, widgets, clip) {
    super(node, number);
    [this.enabled, this.file, this.strength] = this.widgets = widgets;
    this.clip = clip;
  }

  get values() {
    const own = clipStrengths(this.clip).get(this.number);
    const { enabled, file, strength } = this;
    return {
      on: enabled.value, lora: file.value, strength: strength.value,
      ...(own !== undefined && { strength_clip: own }),
    };
  }

  set values({ on, lora, strength, strength_clip }) {
    [on, lora, strength].forEach((value, index) => {
      if (this.widgets[index].value !== value) set(this.node, this.widgets[index], value);
    });
    const strengths = clipStrengths(this.clip);
    if (strengths.get(this.number) === strength_clip) return;
    if (strength_clip === undefined) strengths.delete(this.number);
    else strengths.set(this.number, strength_clip);
    const parts = [...strengths].sort(([a], [b]) => a - b).map(([row, own]) => `${row} = ${own}`);
    set(this.node, this.clip, parts.join(", "));
  }
}

/** Strengths for CLIP that differ from those for the model, by row, as the widget for them has them. */
function clipStrengths(widget) {
  const parts = String(widget.value ?? "").split(",").map((part) => part.split("=").map(Number));
  return new Map(parts.filter((part) => part.length === 2));
}

class TextSlot extends Slot {
  constructor(node, number, text) {
    super(node, number);
    this.text = text;
  }

  get index() {
    return this.number - WIDGETS.length - 1;
  }

  get values() {
    return readRows(this.text.value)[this.index] ?? EMPTY;
  }

  set values(given) {
    const rows = readRows(this.text.value);
    rows[this.index] = given;
    writeRows(this.node, this.text, rows);
  }
}

/** Rows as JSON has them; none where it cannot be read, which the node says when it runs. */
export function readRows(text) {
  try {
    const rows = JSON.parse(text || "[]");
    return Array.isArray(rows) ? rows.filter((row) => typeof row?.lora === "string").map(sound) : [];
  } catch {
    return [];
  }
}

function sound({ on, lora, strength, strength_clip }) {
  const own = Number.isFinite(strength_clip) && { strength_clip };
  return { on: on !== false, lora, strength: Number.isFinite(strength) ? strength : 1, ...own };
}

function writeRows(node, widget, rows) {
  set(node, widget, rows.length ? JSON.stringify(rows) : "");
}

/** All rows of a node; undefined where it has no such widgets. */
export function slotsOf(node) {
  const rows = WIDGETS.map((number) => FIELDS.map((field) => widgetOf(node, field + number)));
  const clip = widgetOf(node, "clip_strengths");
  const text = widgetOf(node, MORE_ROWS);
  return rows.flat().includes(undefined) || !clip || !text ? undefined : new Slots(node, rows, clip, text);
}

class Slots {
  constructor(node, rows, clip, text) {
    Object.assign(this, { node, clip, text });
    this.fixed = rows.map((widgets, index) => new WidgetSlot(node, index + 1, widgets, clip));
  }

  get all() {
    const more = readRows(this.text.value).map((_, index) => this.behind(index));
    return [...this.fixed, ...more];
  }

  behind(index) {
    return new TextSlot(this.node, WIDGETS.length + 1 + index, this.text);
  }

  /** Those that are shown as a line. */
  get shown() {
    return this.all.filter((slot) => slot.isUsed() && !slot.isPlain());
  }

  get files() {
    const given = this.fixed[0].file.options.values;
    return (typeof given === "function" ? given() : given).filter((file) => file !== NONE);
  }

  /** Put a row behind all others, and say which it is. */
  add(values) {
    const last = this.all.findLastIndex((slot) => slot.isUsed() || slot.isPlain());
    const slot = this.fixed[last + 1] ?? this.behind(Math.max(0, last + 1 - WIDGETS.length));
    slot.values = { ...EMPTY, ...values };
    return slot;
  }

  /** Put a row at a place among those shown; those from there on go below it. */
  insert(place, values) {
    this.add(values);
    for (let at = this.shown.length - 1; at > place; at--) this.swap(at - 1, at);
  }

  /** Two rows, by their places among those shown, with what is linked to them. */
  swap(one, other) {
    const pair = [this.shown[one], this.shown[other]];
    const contents = pair.map((slot) => [slot.values, slot.socket >= 0, slot.origin]).reverse();
    pair.forEach((slot) => slot.closeSocket());
    pair.forEach((slot, index) => {
      const [values, hasSocket, origin] = contents[index];
      slot.values = values;
      if (hasSocket) slot.openSocket(origin);
    });
  }

  /** Those behind it move up. */
  remove(slot) {
    const { shown } = this;
    const at = shown.findIndex(({ number }) => number === slot.number);
    for (let next = at + 1; next < shown.length; next++) this.swap(next - 1, next);
    const last = shown.at(-1);
    last.closeSocket();
    if (last instanceof WidgetSlot) last.values = EMPTY;
    else this.cut(last.index);
  }

  /** Put these rows in the place of all that are shown. */
  replace(rows) {
    while (this.shown.length) this.remove(this.shown.at(-1));
    rows.forEach((values) => this.add(values));
  }

  cut(index) {
    writeRows(this.node, this.text, readRows(this.text.value).slice(0, index));
  }
}
