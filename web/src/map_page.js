// The map for a page of one file, without a server: fluxedu trace and the documentation. The page holds the data.
import { createMap } from "./map.js";

globalThis.fluxeduMap = createMap;
