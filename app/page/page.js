/* <mask-painter image="data:..." cell="4">: an image on which a mask is painted, with the mouse, a finger or the keyboard.
   `mask` is the mask as the address of a PNG, white where it is painted; "" where nothing is.
   <before-after before="data:..." after="data:...">: two images behind a slider. */

/* An element that is built from its attributes, and again when they change: Gradio changes an element in place and
   drops what it does not know in it. */
class Built extends HTMLElement {
  connectedCallback() {
    this.build();
    this.watch = new MutationObserver((changes) => {
      if (!this.firstChild || changes.some((change) => change.type === "attributes")) this.build();
    });
    this.watch.observe(this, { attributeFilter: this.constructor.needs, childList: true });
  }

  disconnectedCallback() {
    this.watch.disconnect();
  }
}

class MaskPainter extends Built {
  static needs = ["image", "cell"];

  constructor() {
    super();
    this.addEventListener("click", (event) => {
      const { tool, act } = event.target.dataset ?? {};
      if (tool) this.choose(tool);
      if (act === "clear") { this.cells?.fill(0); this.draw(); }
    });
  }

  build() {
    this.cells = null;
    this.pressed = false;
    this.innerHTML = `
      <div class="tools" role="toolbar" aria-label="Tools">
        <button type="button" data-tool="brush">Brush</button>
        <button type="button" data-tool="box">Box</button>
        <button type="button" data-tool="erase">Erase</button>
        <label>Size <input type="range" min="1" max="16" aria-label="Size of the brush in pixels"></label>
        <button type="button" data-act="clear">Clear</button>
      </div>
      <canvas class="view" tabindex="0" role="application"
        aria-label="Mask on the image. Arrow keys move, with shift by a code; space paints, or sets a corner of a box."></canvas>
      <p class="hint" aria-live="polite"></p>`;
    this.canvas = this.querySelector("canvas");
    this.size = this.querySelector("input");
    const image = new Image();
    image.onload = () => { if (image === this.image) this.begin(); };
    image.src = this.getAttribute("image");
    this.image = image;
    this.canvas.addEventListener("pointerdown", (event) => this.press(event));
    this.canvas.addEventListener("pointermove", (event) => this.move(event));
    this.canvas.addEventListener("pointerup", () => this.release());
    this.canvas.addEventListener("pointercancel", () => this.release());
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("blur", () => this.draw());
    this.canvas.addEventListener("focus", () => this.draw());
  }

  begin() {
    [this.columns, this.rows] = [this.image.naturalWidth, this.image.naturalHeight];
    this.cell = Number(this.getAttribute("cell")) || 1;
    this.scale = Math.max(1, Math.round(512 / Math.max(this.columns, this.rows)));
    this.canvas.width = this.columns * this.scale;
    this.canvas.height = this.rows * this.scale;
    this.size.max = Math.max(this.columns, this.rows) >> 1;
    this.size.value = this.cell;
    this.cells = new Uint8Array(this.columns * this.rows);
    this.at = { x: this.columns >> 1, y: this.rows >> 1 };
    this.choose("brush");
  }

  choose(tool) {
    this.tool = tool;
    this.corner = null;
    this.querySelectorAll("[data-tool]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.tool === tool));
    this.draw();
  }

  pixel(event) {
    const box = this.canvas.getBoundingClientRect();
    const place = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
    return {
      x: place((event.clientX - box.left) / box.width, this.columns),
      y: place((event.clientY - box.top) / box.height, this.rows),
    };
  }

  press(event) {
    event.preventDefault();
    this.canvas.focus({ preventScroll: true });
    this.canvas.setPointerCapture(event.pointerId);
    this.at = this.pixel(event);
    this.pressed = true;
    if (this.tool === "box") this.corner = this.at;
    else this.stamp(this.at);
    this.draw();
  }

  move(event) {
    const [from, to] = [this.at, this.pixel(event)];
    this.at = to;
    if (this.pressed && this.tool !== "box") {
      const steps = Math.max(Math.abs(to.x - from.x), Math.abs(to.y - from.y), 1);
      for (let i = 1; i <= steps; i++) {
        const share = i / steps;
        this.stamp({ x: Math.round(from.x + share * (to.x - from.x)), y: Math.round(from.y + share * (to.y - from.y)) });
      }
    }
    this.draw();
  }

  release() {
    if (this.pressed && this.tool === "box" && this.corner) this.fill();
    this.pressed = false;
    this.draw();
  }

  key(event) {
    const by = event.shiftKey ? this.cell : 1;
    const ways = { ArrowLeft: [-by, 0], ArrowRight: [by, 0], ArrowUp: [0, -by], ArrowDown: [0, by] };
    if (ways[event.key]) {
      const [x, y] = ways[event.key];
      this.at = {
        x: Math.min(this.columns - 1, Math.max(0, this.at.x + x)),
        y: Math.min(this.rows - 1, Math.max(0, this.at.y + y)),
      };
    } else if (event.key === " " || event.key === "Enter") {
      if (this.tool !== "box") this.stamp(this.at);
      else if (this.corner) this.fill();
      else this.corner = this.at;
    } else return;
    event.preventDefault();
    this.draw();
  }

  paint(left, top, right, bottom, inside = () => true) {
    if (!this.cells) return;
    const value = this.tool === "erase" ? 0 : 1;
    for (let y = Math.max(0, top); y <= Math.min(this.rows - 1, bottom); y++)
      for (let x = Math.max(0, left); x <= Math.min(this.columns - 1, right); x++)
        if (inside(x, y)) this.cells[y * this.columns + x] = value;
  }

  stamp({ x, y }) {
    const size = Number(this.size.value), left = x - (size >> 1), top = y - (size >> 1), centre = (size - 1) / 2;
    const inside = (px, py) => (px - left - centre) ** 2 + (py - top - centre) ** 2 <= (size / 2) ** 2 + 0.1;
    this.paint(left, top, left + size - 1, top + size - 1, inside);
  }

  ends() {
    const [a, b] = [this.corner, this.at];
    return [Math.min(a.x, b.x), Math.min(a.y, b.y), Math.max(a.x, b.x), Math.max(a.y, b.y)];
  }

  fill() {
    this.paint(...this.ends());
    this.corner = null;
  }

  draw() {
    if (!this.cells) return;
    const context = this.canvas.getContext("2d"), s = this.scale;
    context.imageSmoothingEnabled = false;
    context.drawImage(this.image, 0, 0, this.canvas.width, this.canvas.height);
    context.fillStyle = "rgba(255, 0, 160, 0.6)";
    this.cells.forEach((on, i) => on && context.fillRect((i % this.columns) * s, Math.floor(i / this.columns) * s, s, s));
    context.strokeStyle = "rgba(255, 255, 255, 0.25)";
    context.lineWidth = 1;
    context.beginPath();
    for (let x = this.cell; x < this.columns; x += this.cell) { context.moveTo(x * s, 0); context.lineTo(x * s, this.canvas.height); }
    for (let y = this.cell; y < this.rows; y += this.cell) { context.moveTo(0, y * s); context.lineTo(this.canvas.width, y * s); }
    context.stroke();
    if (document.activeElement === this.canvas) {
      const size = this.tool === "box" ? 1 : Number(this.size.value);
      const box = this.corner ? this.ends() : [this.at.x - (size >> 1), this.at.y - (size >> 1), this.at.x - (size >> 1) + size - 1, this.at.y - (size >> 1) + size - 1];
      for (const [colour, width] of [["black", 4], ["white", 2]]) {
        context.strokeStyle = colour;
        context.lineWidth = width;
        context.strokeRect(box[0] * s, box[1] * s, (box[2] - box[0] + 1) * s, (box[3] - box[1] + 1) * s);
      }
    }
    const count = this.cells.reduce((sum, on) => sum + on, 0);
    this.querySelector(".hint").textContent = `${count} of ${this.cells.length} pixels are painted; these are drawn anew.`;
  }

  get mask() {
    if (!this.cells || !this.cells.some(Boolean)) return "";
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [this.columns, this.rows];
    const context = canvas.getContext("2d"), pixels = context.createImageData(this.columns, this.rows);
    this.cells.forEach((on, i) => pixels.data.set([255 * on, 255 * on, 255 * on, 255], 4 * i));
    context.putImageData(pixels, 0, 0);
    return canvas.toDataURL("image/png");
  }
}

class BeforeAfter extends Built {
  static needs = ["before", "after"];

  build() {
    this.innerHTML = `
      <div class="pair"><img class="after" alt="After"><img class="before" alt="Before"></div>
      <label>Before <input type="range" min="0" max="100" value="50" aria-label="Share of the image before"> After</label>`;
    for (const name of ["before", "after"]) this.querySelector("." + name).src = this.getAttribute(name);
    const input = this.querySelector("input");
    const show = () => this.style.setProperty("--share", `${input.value}%`);
    input.addEventListener("input", show);
    show();
  }
}

customElements.define("mask-painter", MaskPainter);
customElements.define("before-after", BeforeAfter);
