package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// rpcEcho is a service that answers with what it is asked: one call, or a
// stream of messages in both directions. A call without bytes is an error.
var rpcEcho = grpc.ServiceDesc{
	ServiceName: "numastack.Echo",
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{
		MethodName: "Once",
		Handler: func(_ any, _ context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			in := new(wrapperspb.BytesValue)
			if err := decode(in); err != nil {
				return nil, err
			}
			if len(in.Value) == 0 {
				return nil, status.Error(codes.InvalidArgument, "no bytes")
			}
			return in, nil
		},
	}},
	Streams: []grpc.StreamDesc{{
		StreamName:    "Stream",
		ServerStreams: true,
		ClientStreams: true,
		Handler: func(_ any, s grpc.ServerStream) error {
			for {
				in := new(wrapperspb.BytesValue)
				switch err := s.RecvMsg(in); {
				case errors.Is(err, io.EOF):
					return nil
				case err != nil:
					return err
				}
				if err := s.SendMsg(in); err != nil {
					return err
				}
			}
		},
	}},
}

// TestForeignGRPC calls a server of grpc-go with its client, over TLS: calls
// side by side, an error, a long stream, the health service.
func TestForeignGRPC(t *testing.T) {
	forForeign(t, 4, func(t *testing.T, r *rig) {
		r.forDirections(t, func(t *testing.T, d direction) {
			ctx, cancel := context.WithTimeout(t.Context(), transferTime)
			defer cancel()
			conn := serveRPC(t, d)
			t.Run("calls", func(t *testing.T) { rpcCalls(ctx, t, conn) })
			t.Run("stream", func(t *testing.T) { rpcStream(ctx, t, conn) })
			t.Run("health", func(t *testing.T) {
				answer, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, new(grpc_health_v1.HealthCheckRequest))
				if err != nil || answer.Status != grpc_health_v1.HealthCheckResponse_SERVING {
					t.Errorf("answer is %v, %v", answer, err)
				}
			})
		})
	})
}

// serveRPC starts a server at one end of d, and returns a client's connection.
func serveRPC(t *testing.T, d direction) *grpc.ClientConn {
	t.Helper()
	serverTLS, clientTLS := tlsConfigs(t, "h2")
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(serverTLS)))
	server.RegisterService(&rpcEcho, nil)
	grpc_health_v1.RegisterHealthServer(server, health.NewServer())
	l := d.listen(t)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	t.Cleanup(func() {
		server.GracefulStop()
		if err := <-ended; err != nil {
			t.Errorf("the server ended with %v", err)
		}
	})
	conn, err := grpc.NewClient("passthrough:///"+l.Addr().String(),
		grpc.WithTransportCredentials(credentials.NewTLS(clientTLS)),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			return d.dial(ctx, "tcp", address)
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	})
	return conn
}

func rpcCalls(ctx context.Context, t *testing.T, conn *grpc.ClientConn) {
	const callers, calls = 10, 20
	errs := make(chan error, callers*calls)
	var calling sync.WaitGroup
	for caller := range callers {
		calling.Go(func() {
			for i := range calls {
				errs <- rpcOnce(ctx, conn, payload(uint64(caller), 1+i*i*1000))
			}
		})
	}
	calling.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			t.Error(err)
		}
	}
	if err := rpcOnce(ctx, conn, nil); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a call without bytes: %v, want InvalidArgument", err)
	}
}

func rpcOnce(ctx context.Context, conn *grpc.ClientConn, b []byte) error {
	out := new(wrapperspb.BytesValue)
	if err := conn.Invoke(ctx, "/numastack.Echo/Once", wrapperspb.Bytes(b), out); err != nil {
		return err
	}
	return same(out.Value, b)
}

func rpcStream(ctx context.Context, t *testing.T, conn *grpc.ClientConn) {
	const messages, period = 1600 / raceFactor, 100
	message := func(i int) []byte { return payload(uint64(i%period), i%period*300) }
	s, err := conn.NewStream(ctx, &rpcEcho.Streams[0], "/numastack.Echo/Stream")
	if err != nil {
		t.Fatal(err)
	}
	sent := make(chan error, 1)
	go func() {
		for i := range messages {
			if err := s.SendMsg(wrapperspb.Bytes(message(i))); err != nil {
				sent <- fmt.Errorf("send message %d: %w", i, err)
				return
			}
		}
		sent <- s.CloseSend()
	}()
	for i := range messages {
		out := new(wrapperspb.BytesValue)
		if err := s.RecvMsg(out); err != nil {
			t.Fatalf("message %d: %v", i, err)
		}
		if err := same(out.Value, message(i)); err != nil {
			t.Errorf("message %d: %v", i, err)
		}
	}
	if err := s.RecvMsg(new(wrapperspb.BytesValue)); !errors.Is(err, io.EOF) {
		t.Errorf("after the last message: %v, want EOF", err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
}
