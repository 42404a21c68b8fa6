// What HTML alone can't do: times in the reader's own zone, buttons that copy, and forms that a
// double click sends once. Without this script times stay in UTC, those buttons stay hidden, a form
// that is sent again is refused, and every page works.
"use strict";

const language = document.documentElement.lang || undefined;
const toTheMinute = new Intl.DateTimeFormat(language, { dateStyle: "medium", timeStyle: "short" });
const toTheSecond = new Intl.DateTimeFormat(language, { dateStyle: "medium", timeStyle: "medium" });

for (const time of document.querySelectorAll('time[datetime$="Z"]')) {
  const instant = new Date(time.dateTime);
  if (Number.isNaN(instant.getTime())) continue;
  time.title = time.textContent.trim();
  const format = time.dataset.style === "second" ? toTheSecond : toTheMinute;
  time.textContent = format.format(instant);
}

// Must be in the page before it says anything, or screen readers miss the first announcement.
const announcement = document.createElement("p");
announcement.setAttribute("role", "status");
announcement.className = "visually-hidden";

async function copy(source) {
  try {
    await navigator.clipboard.writeText(source.textContent);
    return true;
  } catch {
    // Refused, or there is no clipboard since the page came over plain HTTP: the older way, which
    // leaves the text selected in case that is refused too.
    getSelection().selectAllChildren(source);
    return document.execCommand("copy");
  }
}

for (const button of document.querySelectorAll("button[data-copy]")) {
  const source = document.getElementById(button.dataset.copy);
  if (!source) continue;
  const label = button.textContent;
  let timer;
  button.addEventListener("click", async () => {
    const copied = await copy(source);
    button.textContent = copied ? "Copied" : "Selected";
    announcement.textContent = copied ? "Copied" : "Selected. Press Ctrl+C or Command+C to copy.";
    clearTimeout(timer);
    timer = setTimeout(() => {
      button.textContent = label;
      announcement.textContent = "";
    }, 2000);
  });
  button.hidden = false;
  document.body.append(announcement);
}

for (const form of document.querySelectorAll('form[method="post"]')) {
  let sent = false;
  form.addEventListener("submit", (event) => {
    if (sent) event.preventDefault();
    sent = true;
    setTimeout(() => (sent = false), 3000); // in case it was stopped
  });
  addEventListener("pageshow", () => (sent = false));
}
