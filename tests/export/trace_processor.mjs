// Runs Perfetto's trace processor (engine_bundle.js of the Perfetto UI, with its WebAssembly) under node:
// what comes in on stdin is given to it, what it answers goes to stdout, both in its own RPC protocol.
// The bundle is made for a web worker, so the few things of a worker that it uses are put in place first.
//
//   node trace_processor.mjs FOLDER   (the folder that holds engine_bundle.js)

import {readFileSync, writeSync} from 'node:fs';
import {join} from 'node:path';
import {runInThisContext} from 'node:vm';

const folder = process.argv[2];
const stdin = process.stdin;

globalThis.self = globalThis;
globalThis.WorkerGlobalScope = class {};
globalThis.location = {href: 'https://localhost/'};
globalThis.XMLHttpRequest = class {
  open(method, url) {
    this.url = url;
  }
  send() {
    this.response = readFileSync(join(folder, this.url));
  }
};
for (const level of ['log', 'info', 'warn', 'error']) {
  console[level] = (...words) => writeSync(2, words.join(' ') + '\n');
}
// the bundle refuses to run where it takes the surroundings for node
delete globalThis.process;
try {
  runInThisContext(readFileSync(join(folder, 'engine_bundle.js'), 'utf8'), 'engine_bundle.js');
} catch (error) {
  // without this, node prints the whole bundle, which is one line
  throw new Error(`engine_bundle.js: ${error.message}`);
}
// what waits for the WebAssembly runs before the next turn of the event loop
await new Promise((resolve) => setTimeout(resolve, 0));

const port = {
  postMessage(bytes) {
    for (let done = 0; done < bytes.length; ) {
      done += writeSync(1, bytes, done);
    }
  },
};
globalThis.onmessage({data: port});
for await (const chunk of stdin) {
  port.onmessage({data: new Uint8Array(chunk)});
}
