// The service worker: keeps all files of the page, so that it works again without a network.
// The line above, which names the version, is written by fluxedu.play; another version is another cache.
const CACHE = `fluxedu-${self.VERSION}`;

async function keepAll() {
  const response = await fetch("files.json", { cache: "no-cache" });
  const { files } = await response.clone().json();
  const cache = await caches.open(CACHE);
  await cache.put("files.json", response);
  await cache.addAll(["./", ...Object.entries(files).map(([name, { url }]) => url ?? name)].filter((n) => n !== "sw.js"));
}

async function removeOthers() {
  for (const name of await caches.keys()) {
    if (name.startsWith("fluxedu-") && name !== CACHE) await caches.delete(name);
  }
  await self.clients.claim();
}

self.addEventListener("install", (event) => event.waitUntil(keepAll()));
self.addEventListener("activate", (event) => event.waitUntil(removeOthers()));
self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method !== "GET" || new URL(request.url).origin !== self.location.origin) return;
  const kept = caches.open(CACHE).then((cache) => cache.match(request, { ignoreSearch: true }));
  event.respondWith(kept.then((response) => response ?? fetch(request)));
});
