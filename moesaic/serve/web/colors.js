// The colour scale of the heat map: equal steps in OKLab, so that equal differences of load look equally different, and
// lightness that only rises or falls, so that it reads without telling hues apart.

const NUM_COLORS = 256;

// Lightness, chroma, hue in degrees. From the page's ground (nothing) to its ink (much).
const STOPS = {
  light: [
    [0.955, 0.025, 105],
    [0.85, 0.085, 150],
    [0.68, 0.105, 200],
    [0.5, 0.12, 245],
    [0.3, 0.11, 280],
  ],
  dark: [
    [0.27, 0.045, 275],
    [0.42, 0.12, 270],
    [0.6, 0.115, 235],
    [0.78, 0.115, 185],
    [0.94, 0.11, 110],
  ],
};

/** Return [L, a, b] of lightness, chroma and hue. */
function labOf([lightness, chroma, hue]) {
  const angle = (hue * Math.PI) / 180;
  return [lightness, chroma * Math.cos(angle), chroma * Math.sin(angle)];
}

/** Return sRGB bytes of an OKLab colour. Source: B. Ottosson, "A perceptual color space for image processing", 2020. */
function bytesOf([lightness, a, b]) {
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  return linear.map((value) => {
    const clipped = Math.min(1, Math.max(0, value));
    return Math.round(255 * (clipped <= 0.0031308 ? 12.92 * clipped : 1.055 * clipped ** (1 / 2.4) - 0.055));
  });
}

function mix(from, to, share) {
  return from.map((value, index) => value + share * (to[index] - value));
}

function distance(from, to) {
  return Math.hypot(...from.map((value, index) => value - to[index]));
}

/** Return NUM_COLORS sRGB triples of bytes, from none to much. scheme: "light" or "dark". */
export function scaleOf(scheme) {
  const stops = STOPS[scheme].map(labOf);
  const lengths = stops.slice(1).map((stop, index) => distance(stops[index], stop));
  const total = lengths.reduce((sum, length) => sum + length, 0);
  return Array.from({ length: NUM_COLORS }, (_, index) => {
    let place = (index / (NUM_COLORS - 1)) * total;
    let part = 0;
    while (part < lengths.length - 1 && place > lengths[part]) place -= lengths[part++];
    return bytesOf(mix(stops[part], stops[part + 1], place / lengths[part]));
  });
}

/** Return the relative luminance, 0 to 1, of sRGB bytes, as WCAG 2 defines it. */
export function luminanceOf(bytes) {
  const [red, green, blue] = bytes.map((byte) => {
    const value = byte / 255;
    return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}
