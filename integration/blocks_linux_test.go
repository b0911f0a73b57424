package integration

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"testing"

	"numastack/stack"
)

// TestBlocks sends one block on many connections of every door, to peers of the
// kernel, each of which gets all of it.
func TestBlocks(t *testing.T) {
	const size, conns = 3<<20 + 1, 4 // more than any send buffer
	content := payload(7, size)
	block := stack.NewBlock(content)
	type blockWriter interface {
		WriteBlock(*stack.Block) (int, error)
	}
	send := func(c halfCloser) error {
		n, err := c.(blockWriter).WriteBlock(block)
		if err == nil && n != size {
			err = fmt.Errorf("WriteBlock = %d, want %d", n, size)
		}
		return errors.Join(err, c.CloseWrite())
	}
	forForeign(t, 4, func(t *testing.T, r *rig) {
		doors := r.blockingDoors(t, func(c halfCloser) {
			if err := send(c); err != nil {
				t.Errorf("the stack: %v", err)
			}
			_, _ = c.Read(make([]byte, 1)) // until the peer has it
		})
		l, err := r.HandleTCP("tcp", ":0", &blockEvents{block: block})
		if err != nil {
			t.Fatal(err)
		}
		doors = append(doors, blockingDoor{"HandleTCP", func(t *testing.T) *net.TCPConn {
			_, port, err := net.SplitHostPort(l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			return dialKernel(t, net.JoinHostPort(r.self4.String(), port)).(*net.TCPConn)
		}})
		for _, door := range doors {
			for i := range conns {
				c := door.open(t)
				var got bytes.Buffer
				if _, err := got.ReadFrom(c); err != nil {
					t.Errorf("%s, connection %d: %v", door.name, i, err)
				}
				if err := same(got.Bytes(), content); err != nil {
					t.Errorf("%s, connection %d: %v", door.name, i, err)
				}
				_ = c.Close()
			}
		}
	})
}

// blockEvents sends a block on every connection.
type blockEvents struct{ block *stack.Block }

func (h *blockEvents) Open(c *stack.Conn) {
	c.SetContext(0)
	h.Writable(c)
}

func (h *blockEvents) Writable(c *stack.Conn) {
	for done := c.Context().(int); ; {
		n, err := c.WriteBlock(h.block, done)
		done += n
		c.SetContext(done)
		switch {
		case err != nil:
			c.Abort()
			return
		case done == h.block.Len():
			c.Close()
			return
		case n == 0:
			return
		}
	}
}

func (h *blockEvents) Data(_ *stack.Conn, b []byte) int { return len(b) }

func (h *blockEvents) Close(*stack.Conn, error) {}
