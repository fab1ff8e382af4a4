/** Small helpers that build elements. Text always goes into text nodes, never through HTML. */

export const $ = (id) => document.getElementById(id);

/** Create an element with these properties and children (elements, strings or arrays of them). */
export function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  // Not append(...all): a call takes fewer arguments than a response may have elements.
  for (const child of children.flat()) element.append(child);
  return element;
}

/** Create a line of small, quiet text. */
export function note(...children) {
  return make("p", { className: "note" }, ...children);
}

export function button(label, onclick, properties = {}) {
  return make("button", { type: "button", onclick, ...properties }, label);
}

/** Remove bidirectional controls and tag characters, which can hide or reorder text. */
export function visible(text) {
  return text.replace(/[\u202a-\u202e\u2066-\u2069\u{e0000}-\u{e007f}]/gu, "");
}

/** Report a change of state to screen readers. */
export function announce(text) {
  $("status").textContent = text;
}

/**
 * Create a button that copies `text`, or the text that `node` has when the button is pressed.
 *
 * Browsers offer the clipboard over HTTPS and on localhost only. Elsewhere the button selects the
 * contents of `node`, ready to be copied with the keyboard.
 */
export function copyButton(name, { label = "Copy", node, text }) {
  const copy = button(label, async () => {
    try {
      await navigator.clipboard.writeText(text ?? node.textContent);
      copy.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(node);
      copy.textContent = "Selected";
    }
    announce(copy.textContent);
    setTimeout(() => { copy.textContent = label; }, 2000);
  }, { ariaLabel: name, title: name });
  return copy;
}
