// The dashboard's beginning: whoever has a session goes on, everybody else signs in. What is behind that is loaded
// then: a stranger needs little.

import { onSignedOut } from "./api.js";
import { current, forget, resume, signIn } from "./session.js";

const main = document.getElementById("main");
const OVER = "You are signed out: the session is over, or its key has ended.";
let pages = null;

async function enter() {
  pages ??= await import("./pages.js");
  pages.begin(leave);
}

function leave(words) {
  forget();
  pages?.close();
  signIn(main, words, enter);
}

onSignedOut(() => {
  if (current()) leave(OVER);
});

try {
  if (await resume()) await enter();
  else leave();
} catch (error) {
  leave(error.message);
}
