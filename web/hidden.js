/** Widgets that are there, saved and sent, and not seen. */

/**
 * `hidden` is asked for whenever a node is drawn, so it is worked out then, and nothing has to be kept up to date.
 * `last` is the widget where the end is drawn that a link could have at a hidden one.
 */
export function hideIf(widget, isHidden, last) {
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

/** Calls `changed` whenever a widget is given a value. */
export function watch(widget, changed) {
  let own = widget.value;
  const held = accessor(Object.getPrototypeOf(widget), "value");
  Object.defineProperty(widget, "value", {
    configurable: true,
    enumerable: true,
    get: () => (held ? held.get.call(widget) : own),
    set: (given) => {
      if (held) held.set.call(widget, given);
      else own = given;
      changed();
    },
  });
}

function accessor(prototype, name) {
  if (!prototype) return undefined;
  const found = Object.getOwnPropertyDescriptor(prototype, name);
  return found?.get && found.set ? found : accessor(Object.getPrototypeOf(prototype), name);
}
