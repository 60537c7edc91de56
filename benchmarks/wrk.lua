-- POSTs the files that WRK_BODIES names, one after the other; prints one JSON line at the end.
local bodies, turn = {}, 0
for name in string.gmatch(os.getenv("WRK_BODIES"), "[^\n]+") do
  local file = assert(io.open(name, "rb"))
  bodies[#bodies + 1] = file:read("*all")
  file:close()
end
local headers = { ["Content-Type"] = os.getenv("WRK_CONTENT_TYPE") or "application/octet-stream" }

function request()
  turn = turn % #bodies + 1
  return wrk.format("POST", nil, headers, bodies[turn])
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format(
    '\n{"rps": %.2f, "p50_ms": %.3f, "p99_ms": %.3f, "errors": %d}\n',
    summary.requests / (summary.duration / 1e6),
    latency:percentile(50) / 1000, latency:percentile(99) / 1000,
    e.connect + e.read + e.write + e.status + e.timeout))
end
