// Light or dark: the system's choice until the reader makes one, which is then remembered.

import { recall, remember } from "./storage.js";

const STORED = "moesaic.theme";
const systemDark = window.matchMedia("(prefers-color-scheme: dark)");

/** Return "light" or "dark", as the page looks now. */
export function scheme() {
  return document.documentElement.dataset.theme ?? (systemDark.matches ? "dark" : "light");
}

/** Let a button switch the scheme; call `changed` after each change, the system's included. */
export function setUpTheme(button, changed) {
  const stored = recall("localStorage", STORED);
  if (stored === "light" || stored === "dark") document.documentElement.dataset.theme = stored;
  const label = () => {
    const other = scheme() === "dark" ? "light" : "dark";
    button.setAttribute("aria-label", `Switch to ${other} colours`);
    button.title = `Switch to ${other} colours`;
  };
  button.addEventListener("click", () => {
    const next = scheme() === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    remember("localStorage", STORED, next);
    label();
    changed();
  });
  systemDark.addEventListener("change", () => {
    label();
    changed();
  });
  label();
}
