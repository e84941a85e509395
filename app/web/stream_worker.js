// A shared worker: holds the one stream of the line, and tells it to every tab.

import { Stream } from './stream.js';

const ports = new Set();
let stream = null;

addEventListener('connect', (event) => {
  const [port] = event.ports;
  port.onmessage = ({ data }) => {
    if ('key' in data) join(port, data.key);
    else if (data.leaves) leave(port);
    else stream?.look();
  };
});

function join(port, key) {
  ports.add(port);
  if (stream === null) {
    stream = new Stream(key, (message) => { for (const one of ports) one.postMessage(message); });
    stream.run();
  } else {
    stream.key = key;
    for (const message of stream.known()) port.postMessage(message);
    stream.look();
  }
}

function leave(port) {
  ports.delete(port);
  if (ports.size) return;
  stream?.end();
  stream = null;
}
