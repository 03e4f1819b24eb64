// What outlives a reload. A browser may forbid it (then even looking at it throws): the page works without.

/** Return what was kept under a name, or null. area: "localStorage" or "sessionStorage". */
export function recall(area, name) {
  try {
    return window[area].getItem(name);
  } catch {
    return null;
  }
}

/** Keep a value under a name; null forgets it. */
export function remember(area, name, value) {
  try {
    if (value === null) window[area].removeItem(name);
    else window[area].setItem(name, value);
  } catch {
    // The value lasts until the page is left.
  }
}
