/**
 * The rows of LoRA Stack, a line each. They are a view of the node's own widgets, which hold what a workflow saves and
 * a prompt sends: without this file the same workflow runs, with all its widgets in sight.
 */

import { hideIf, watch } from "./hidden.js";
import { showInfo } from "./lora_info.js";
import { deletePreset, loadPreset, savePreset } from "./lora_presets.js";
import { isLinked, set, slotsOf } from "./lora_slots.js";
import { make, menu, style } from "./parts.js";
import { say } from "./words.js";

const VIEW = "graft_rows"; // name of the widget that shows the rows
const IF_MISSING = { name: "if_missing", stop: "error", skip: "skip" };
const LINE = 26; // pixels of a row

const STYLE = `
.graft-rows { font: 12px Inter, Arial, sans-serif; color: var(--input-text); overflow: hidden; }
.graft-rows > div { display: flex; align-items: center; gap: 4px; height: ${LINE - 4}px; margin-bottom: 4px; }
.graft-rows button, .graft-rows input[type=number] {
  height: 22px; min-width: 0; box-sizing: border-box; font: inherit; color: inherit; padding: 0 6px;
  background: var(--comfy-input-bg); border: 1px solid var(--border-color); border-radius: 4px;
}
.graft-rows button { cursor: pointer; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.graft-rows button:hover { border-color: var(--input-text); }
.graft-rows .name { flex: 1; text-align: left; }
.graft-rows .add { flex: 1; }
.graft-rows input[type=number] { width: 58px; padding-right: 0; text-align: right; }
.graft-rows .number { min-width: 10px; text-align: right; opacity: 0.6; }
.graft-rows .when { opacity: 0.7; }
.graft-rows .off .name, .graft-rows .off input[type=number] { opacity: 0.45; }
.graft-rows .words { opacity: 0.6; white-space: nowrap; }
`;

/** Shows the rows of a LoRA Stack that was just made. */
export function showRows(node) {
  const slots = slotsOf(node);
  const missing = node.widgets?.find(({ name }) => name === IF_MISSING.name);
  if (!slots || !missing || !node.addDOMWidget) return;
  const view = new View(node, slots, missing);
  const hide = (widgets, isHidden) =>
    widgets.forEach((widget) => {
      hideIf(widget, isHidden, () => view.widget);
      watch(widget, view.changed);
    });
  for (const slot of slots.fixed) hide(slot.widgets, () => !slot.isPlain());
  for (const widget of [slots.clip, slots.text, missing]) hide([widget], () => !isLinked(node, [widget]));
  dropSpareSockets(node);
  view.draw();
}

/** What other nodes could be linked to rows, and is not: workflows of a page without this file have all of it. */
export function dropSpareSockets(node) {
  for (let slot = (node.inputs?.length ?? 0) - 1; slot >= 0; slot--) {
    const { name, link } = node.inputs[slot];
    if (name.startsWith("when_") && link == null) node.removeInput(slot);
  }
}

export function refreshRows(node) {
  node.widgets?.find((widget) => widget.name === VIEW)?.graftChanged?.();
}

class View {
  constructor(node, slots, missing) {
    Object.assign(this, { node, slots, missing });
    this.element = document.createElement("div");
    this.element.className = "graft-rows";
    this.changed = () => {
      this.waiting ??= Promise.resolve().then(() => {
        this.waiting = undefined;
        this.draw();
      });
    };
    const height = () => LINE * (this.slots.shown.length + 1) + 2 * (this.widget?.margin ?? 10);
    this.widget = node.addDOMWidget(VIEW, "graft_rows", this.element, {
      serialize: false, // not in the prompt
      hideOnZoom: false,
      getMinHeight: height,
      getMaxHeight: height,
    });
    this.widget.serialize = false; // not in the workflow's widgets_values
    this.widget.graftChanged = this.changed;
  }

  hasClip() {
    return this.node.inputs?.some((slot) => slot.name === "clip" && slot.link != null) ?? false;
  }

  draw() {
    style("graft-rows", STYLE);
    const { shown } = this.slots;
    const lines = shown.map((row) => [row.number, row.values, row.socket >= 0]);
    const state = JSON.stringify([lines, this.hasClip(), this.missing.value, say("More")]);
    if (state === this.drawn) return;
    this.drawn = state;
    this.element.replaceChildren(...shown.map((row) => this.line(row)), this.foot(shown));
    if (this.count !== shown.length) {
      this.count = shown.length;
      this.fit();
    }
    this.node.setDirtyCanvas?.(true, true);
  }

  line(row) {
    const { on, strength, lora: given } = row.values;
    const lora = String(given);
    const name = make("button", {
      className: "name",
      title: say("{file}: choose another file", { file: lora }),
      textContent: lora.split(/[\\/]/).pop().replace(/\.safetensors$/, ""),
      onclick: (event) => this.choose(event, (chosen) => row.change({ lora: chosen })),
    });
    const line = make(
      "div",
      { className: on ? "" : "off" },
      checkbox(say("Switch row {row} on and off", { row: row.number }), on, (value) => row.change({ on: value })),
      make("span", { className: "number", textContent: row.number }),
      name,
      ...(row.socket < 0 ? [] : [make("span", { className: "when", title: say("Has where and when"), textContent: "◐" })]),
      number(say("Strength"), strength, (value) => row.change({ strength: value })),
      ...(this.hasClip() ? [this.clipStrength(row)] : []),
      make("button", { title: say("More"), textContent: "⋮", onclick: (event) => this.rowMenu(event, row) }),
    );
    line.dataset.row = row.number;
    return line;
  }

  clipStrength(row) {
    const { strength, strength_clip } = row.values;
    return number(say("Strength for CLIP"), strength_clip ?? strength, (value) => row.change({ strength_clip: value }));
  }

  foot(shown) {
    const foot = make("div");
    if (shown.length) {
      const all = shown.every((row) => row.values.on);
      const turn = (on) => this.slots.shown.forEach((row) => row.change({ on }));
      foot.append(checkbox(say("Switch all rows on and off"), all, turn));
    }
    const add = (event) => this.choose(event, (lora) => this.slots.add({ lora }));
    foot.append(make("button", { className: "add", textContent: say("+ Add LoRA"), onclick: add }));
    const notes = [
      ...(this.missing.value === IF_MISSING.skip ? [say("skips missing files")] : []),
      ...(shown.length && this.hasClip() ? [say("model, CLIP")] : []),
    ];
    if (notes.length) foot.append(make("span", { className: "words", textContent: notes.join(" · ") }));
    const title = say("Presets and more");
    foot.append(make("button", { title, textContent: "⋮", onclick: (event) => this.footMenu(event, shown) }));
    return foot;
  }

  choose(event, chosen) {
    const { files } = this.slots;
    if (files.length) menu(event, files, (index) => chosen(files[index]));
    else menu(event, [say("no file in models/loras")], () => {});
  }

  rowMenu(event, row) {
    const { slots } = this;
    const { shown } = slots;
    const at = shown.findIndex(({ number }) => number === row.number);
    const has = row.socket >= 0;
    const insert = (place) => this.choose(event, (lora) => slots.insert(place, { lora }));
    const entries = {
      Info: () => showInfo(row.values.lora),
      [has ? "Remove the link for where and when" : "Link where and when"]: () => {
        if (has) row.closeSocket();
        else row.openSocket();
        this.fit();
      },
      ...(at > 0 && { "Move up": () => slots.swap(at - 1, at) }),
      ...(at < shown.length - 1 && { "Move down": () => slots.swap(at, at + 1) }),
      "Insert above": () => insert(at),
      "Insert below": () => insert(at + 1),
      Remove: () => slots.remove(row),
    };
    this.act(event, entries);
  }

  footMenu(event, shown) {
    const { slots, missing } = this;
    const skips = missing.value === IF_MISSING.skip;
    const rows = shown.map((row) => row.values);
    this.act(event, {
      ...(rows.length && { "Save the rows as a preset": () => savePreset(rows) }),
      "Load a preset": () => loadPreset(event, (found) => slots.replace(found)),
      "Add the rows of a preset": () => loadPreset(event, (found) => found.forEach((values) => slots.add(values))),
      "Delete a preset": () => deletePreset(event),
      [skips ? "Stop if a file is missing" : "Skip rows whose file is missing"]: () =>
        set(this.node, missing, skips ? IF_MISSING.stop : IF_MISSING.skip),
    });
  }

  /** A menu of what can be done, by English names. */
  act(event, entries) {
    const names = Object.keys(entries);
    menu(event, names.map((name) => say(name)), (index) => {
      entries[names[index]]();
      this.changed();
    });
  }

  /** As tall as what it has now. */
  fit() {
    this.node.setSize?.([this.node.size[0], this.node.computeSize()[1]]);
  }
}

function checkbox(title, checked, changed) {
  return make("input", { type: "checkbox", title, checked, onchange: ({ target }) => changed(target.checked) });
}

function number(title, value, changed) {
  const made = make("input", { type: "number", title, step: 0.05, min: -100, max: 100, value: round(value) });
  made.onchange = () => (Number.isFinite(made.valueAsNumber) ? changed(made.valueAsNumber) : (made.value = value));
  return made;
}

const round = (value) => Math.round(value * 1000) / 1000;
