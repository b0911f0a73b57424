package main

import (
	"net"

	"numastack/stack"
)

const (
	helloText  = "hello\n"
	healthText = "ok\n"
	plainText  = "text/plain; charset=utf-8"
	allowed    = "GET, HEAD"
)

// route is what answers a path.
type route int

const (
	routeNone route = iota
	routeHello
	routeHealth
	routeWhere
	routeFile
)

// route tells what answers path, as it came from the client.
func (a *app) route(path []byte) route {
	switch {
	case string(path) == "/healthz":
		return routeHealth
	case string(path) == "/whereami":
		return routeWhere
	case a.site != nil:
		return routeFile
	case string(path) == "/":
		return routeHello
	default:
		return routeNone
	}
}

// whereabouts is the answer of /whereami. What a host's socket does not have
// is null.
type whereabouts struct {
	Engine string `json:"engine"`
	Shard  *int   `json:"shard"`
	CPU    *int   `json:"cpu"`
	Node   *int   `json:"node"`
	Peer   string `json:"peer"`
}

func (a *app) whereabouts(c net.Conn) whereabouts {
	w := whereabouts{Engine: a.engine, Peer: c.RemoteAddr().String()}
	if at, ok := below(c).(stack.Where); ok {
		shard, cpu, node := at.Shard(), at.CPU(), at.NUMANode()
		w.Shard, w.CPU, w.Node = &shard, &cpu, &node
	}
	return w
}

// shardOf returns the shard of a connection, -1 on host sockets.
func shardOf(c net.Conn) int {
	if at, ok := below(c).(stack.Where); ok {
		return at.Shard()
	}
	return -1
}
