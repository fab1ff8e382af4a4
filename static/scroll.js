/** Keeps the end of the conversation in view while text arrives. */

import { $ } from "./dom.js";

// New text is followed until the user scrolls up, and again once the user is near the end: it may
// have moved on meanwhile.
let following = true, lastTop = 0;
document.onscroll = () => {
  const { scrollHeight, clientHeight, scrollTop } = document.documentElement;
  const below = scrollHeight - clientHeight - scrollTop;
  following = below < (scrollTop < lastTop ? 2 : clientHeight / 4);
  lastTop = scrollTop;
  $("latest").hidden = following;
};

export function follow(always = false) {
  following ||= always;
  if (!following) return;
  const page = document.documentElement;
  page.scrollTop = page.scrollHeight;
  lastTop = page.scrollTop;
}
