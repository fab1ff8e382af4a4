/** The conversations of this browser: the ids and titles of their sessions, the newest first. */

// Other services on the same origin have another path.
const KEY = `chat-sidecar ${location.pathname}`;
// The service forgets idle sessions anyway, after a day by default.
const MAX_CONVERSATIONS = 50;
// Used when the browser refuses to store anything.
let unsaved = [];

export function listConversations() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) ?? unsaved;
  } catch {
    return unsaved;
  }
}

/** Put `conversation` first. */
export function saveConversation(conversation) {
  const others = listConversations().filter(({ id }) => id !== conversation.id);
  save([conversation, ...others].slice(0, MAX_CONVERSATIONS));
}

export function removeConversation(removed) {
  save(listConversations().filter(({ id }) => id !== removed));
}

function save(conversations) {
  unsaved = conversations;
  try {
    localStorage.setItem(KEY, JSON.stringify(conversations));
  } catch { /* The list lasts as long as the tab. */ }
}
