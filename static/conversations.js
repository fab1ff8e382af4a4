/** The conversations of this browser: the ids and titles of their sessions, the newest first. */

// Other services on the same origin have another path.
const KEY = `chat-sidecar ${location.pathname}`;
// The service forgets idle sessions anyway, after a day by default.
const MAX_CONVERSATIONS = 50;

export function listConversations() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) ?? [];
  } catch {
    return [];
  }
}

/** Put a conversation first. */
export function saveConversation(saved) {
  save([saved, ...listConversations().filter(({ id }) => id !== saved.id)]);
}

export function removeConversation(removed) {
  save(listConversations().filter(({ id }) => id !== removed));
}

function save(conversations) {
  try {
    localStorage.setItem(KEY, JSON.stringify(conversations.slice(0, MAX_CONVERSATIONS)));
  } catch { /* A browser that stores nothing has no list. */ }
}
