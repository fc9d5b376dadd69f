// Package otlp encodes OTLP requests, delivers them, and classifies the answers.
//
// Two things are needed of it: [Open] makes a [Client], which encodes and sends; and the
// [Answer] of each call says whether to go on, wait, split or give up. Nothing is kept:
// the caller stores requests, and may call Send with the same one again.
//
// The official exporters (otlpmetricgrpc, otlpmetrichttp) build each request and
// own the connection, with endpoint, headers, TLS and compression. The package
// takes the finished request before it is sent. So the caller can store it first, and
// send it again, byte for byte, until it is accepted. The package itself encodes only
// the points of large metrics, thousands in each request.
//
// # Glossary
//
//   - Client: one official exporter and the connection that its requests go over.
//   - Request: a serialized ExportMetricsServiceRequest.
//   - Capture: the request that an official exporter was about to send.
//   - Points: the data points of one integer sum, encoded without the official
//     exporter.
//   - Call: one attempt to deliver one request.
//   - Answer: the outcome of a call. Its verdict decides: go on, wait, split, or
//     give the request up.
package otlp
