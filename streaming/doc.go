// Package streaming speaks the wire protocols of the Kubernetes subresources
// exec, attach, portforward and log, and hands the caller plain Go streams:
// [ServeCommand], [ServePortForward] and [ServeLog]. It depends on nothing of
// this module.
//
//	subresource   transport   protocols
//	exec, attach  WebSocket   v5.channel.k8s.io (half-close of stdin), v4.channel.k8s.io,
//	                          channel.k8s.io, none; v5., v4.base64.channel.k8s.io,
//	                          base64.channel.k8s.io
//	              SPDY/3.1    v4.channel.k8s.io, v3., v2., channel.k8s.io
//	portforward   WebSocket   v1.mux.streaming.aaserver.io (our own: [MuxClient]);
//	                          SPDY/3.1+portforward.k8s.io (kubectl's tunnel);
//	                          v4.channel.k8s.io, v4.base64.channel.k8s.io, none (legacy)
//	              SPDY/3.1    portforward.k8s.io
//	log           HTTP        text/plain, flushed as it comes
//	              WebSocket   binary.k8s.io, base64.binary.k8s.io, none
//
// # Contract
//
// Until the upgrade, failures are answered as a metav1.Status of less than
// 1 KiB. An error that is an APIStatus (errors.As) is sent as that.
//
// The callback's context ends, with a cause, when the client goes or the
// request's context ends, on every protocol. The cause of the request's
// context is shown to the client: that is the way to end a session and say
// why. A client that takes nothing holds that up for some seconds at most.
//
// When a Serve function returns, the connection is closed and all goroutines
// that it started have ended. The callback has to return for that: it is
// waited for. The server closes last, once the client has had time to read all
// that was written for it.
//
// # Logs
//
// A log over plain HTTP that isn't whole is cut off, as a response that ends in
// order says that it is. HTTP has no trailers of such a response; a client that
// wants to know why, and asks by [HeaderLogEnd], gets one that ends in order.
//
// # Memory
//
// Memory is bounded for each session, whatever the client and the callback do:
// a writer blocks while its client is slow, a client is slowed while its
// reader is slow. Messages and frames are streamed, never collected. A SPDY
// stream whose reader is slow buffers 1 MiB, and then holds up the other
// streams of its connection: the protocol, as Kubernetes speaks it, has no
// flow control for each stream. A mux stream has: it buffers 256 KiB, more up to
// 16 MiB if it is read fast over a long way, and holds up nobody.
//
// # Who is dead
//
// The server pings every upgraded connection each [Options.PingInterval]. A
// client that could answer and is silent is given up within
// [Options.PeerTimeout].
// It can't answer while it doesn't read, under ^S or in a pager, nor can it be
// heard while a command doesn't read its stdin. Then, on Linux, its kernel's
// acknowledgements tell a paused client from a lost network, which is still
// found in about PeerTimeout if the connection is a direct one. Behind a proxy
// it is the proxy whose kernel answers; there, and elsewhere than on Linux, a
// client that neither reads nor sends anything has [Options.StallTimeout].
// client-go pings over WebSocket even while it is paused: a client that did so
// lives for as long as it does, and is given up within PeerTimeout of its last
// ping, behind a proxy, too.
//
// # Commands that don't read their stdin
//
// A WebSocket is one ordered stream of bytes: when a command doesn't read what
// its client sends, the client's pings can't be read either. client-go gives
// up 61 s after the last pong, and ends its stdin, without telling the server,
// when one write of it takes 60 s (client-go's tools/remotecommand,
// websocket.go). Therefore, while the client isn't read from:
//
//   - The server sends pongs that it wasn't asked for, which RFC 6455 allows
//     and client-go takes for answers.
//   - Once 1 MiB of stdin is buffered, more is taken at 384 KiB each 5 s only,
//     up to [Options.MaxStdin]. That keeps the client's writes from timing out.
//
// So a command may go for seven minutes without reading, at the defaults and
// with a client that has ever more to send, or for any time if the client has
// less than 32 MiB for it; then it can still read all of it. Beyond that the
// session stays up, and the output goes on, but client-go can't send more:
// when the command reads as far as to where client-go broke off, it sees an
// error, ErrPeerTimeout, and never a false end of its stdin. Over SPDY there is
// no such limit: client-go waits for ever.
//
// # Port-forward
//
// A connection that can't be dialled has its data stream reset and its error
// stream ended without a text, as client-go ends all forwards of a session at
// the first text. A client that wants the text asks for it by
// [HeaderErrorText].
//
// Over the mux protocol, docs/protocol.md, each connection is answered with a
// Status, UDP and unix sockets are forwarded too, and the target's side can
// listen for the client. [NewMuxClient] is the client's end of it. A reset of
// either side reaches the other one as a reset, [ErrStreamReset]; a session that
// ends under its connections resets them at the ports.
package streaming
