"use strict";
// What is live: the server draws it anew, and says when it has ended.
for (const part of document.querySelectorAll("[data-live]")) {
  const source = new EventSource(part.dataset.live);
  source.onmessage = (event) => { part.innerHTML = event.data; };
  source.addEventListener("end", () => { source.close(); location.reload(); });
}
// A form that is sent once, however often a key is pressed.
for (const form of document.querySelectorAll("form[data-once]")) {
  form.addEventListener("submit", (event) => {
    if (form.dataset.sent) event.preventDefault();
    form.dataset.sent = "yes";
  });
}
// One key each, as the legend on the buttons says; while one types, keys are letters.
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input:not([type=checkbox], [type=radio]), textarea, select");
  if (event.key === "Escape" && typing) event.target.blur();
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();
  for (const part of document.querySelectorAll("[data-key]")) {
    if (!part.dataset.key.split(" ").includes(key)) continue;
    event.preventDefault();
    if (part.matches("input, textarea")) part.focus(); else part.click();
    return;
  }
});
