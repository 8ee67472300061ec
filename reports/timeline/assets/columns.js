// Undoes columns.py: one gzip stream of byte planes, read column by column when it is first asked for.

class Columns {
  constructor(index, octets) {
    this.index = index;
    this.octets = octets;
    this.known = new Map();
  }

  // Numbers, exact; beyond 2**53 as BigInt.
  get(name) {
    if (!this.known.has(name)) this.known.set(name, this.read(this.index[name]));
    return this.known.get(name);
  }

  read(column) {
    return column.wide ? this.wide(column) : this.narrow(column);
  }

  narrow({ offset, count, width, base, first }) {
    const octets = this.octets;
    const values = new Float64Array(count).fill(Number(base));
    for (let plane = 0, scale = 1; plane < width; plane++, scale *= 256) {
      const from = offset + plane * count;
      for (let index = 0; index < count; index++) values[index] += octets[from + index] * scale;
    }
    if (first !== undefined) {
      let sum = first;
      for (let index = 0; index < count; index++) values[index] = sum += values[index];
    }
    return values;
  }

  wide({ offset, count, width, base }) {
    const start = BigInt(base);
    return Array.from({ length: count }, (_, index) => {
      let value = 0n;
      for (let plane = width - 1; plane >= 0; plane--) value = value * 256n + BigInt(this.octets[offset + plane * count + index]);
      return start + value;
    });
  }
}
