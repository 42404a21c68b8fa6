// Times in the reader's own time zone, buttons that copy, and forms that a double click sends only
// once. Every page works without this script: times stay in UTC, those buttons stay hidden, and the
// gateway refuses a form that is sent again.
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

// This element must be in the page before its text changes, or screen readers miss the first one.
const announcement = document.createElement("p");
announcement.setAttribute("role", "status");
announcement.className = "visually-hidden";

async function copy(source) {
  try {
    await navigator.clipboard.writeText(source.textContent);
    return true;
  } catch {
    // The clipboard is refused, or missing because the page came over plain HTTP. Fall back to
    // execCommand, which leaves the text selected if it is refused, too.
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
    setTimeout(() => (sent = false), 3000); // in case the reader stopped it
  });
  addEventListener("pageshow", () => (sent = false));
}
