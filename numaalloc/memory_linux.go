package numaalloc

import "golang.org/x/sys/unix"

// preferOnly is the mode of every policy set here; Bind says why.
const preferOnly = unix.MPOL_PREFERRED | unix.MPOL_F_STATIC_NODES

// kernelMemory is this machine's. Immutable.
var kernelMemory = memoryCalls{
	mbind: func(pages []byte, node int, move bool) error {
		flags := 0
		if move {
			flags = unix.MPOL_MF_MOVE
		}
		if node == noNode {
			return mbind(pages, unix.MPOL_DEFAULT, nil, flags)
		}
		return mbind(pages, preferOnly, maskOf(node), flags)
	},
	pageNodes: movePages,
	setMempolicy: func(node int) error {
		if node == noNode {
			return setMempolicy(unix.MPOL_DEFAULT, nil)
		}
		return setMempolicy(preferOnly, maskOf(node))
	},
	memsAllowed: func() ([]int, error) {
		_, mask, err := getMempolicy(nil, unix.MPOL_F_MEMS_ALLOWED)
		if err != nil {
			return nil, err
		}
		return mask.nodes(), nil
	},
	mmap: func(n int) ([]byte, error) {
		return unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	},
	munmap: unix.Munmap,
	hugePages: func(b []byte) error {
		return unix.Madvise(b, unix.MADV_HUGEPAGE)
	},
	discard: func(b []byte) error {
		return unix.Madvise(b, unix.MADV_DONTNEED)
	},
}

// maskOf returns the mask of one node, which checkNode let pass.
func maskOf(node int) *nodeMask {
	var mask nodeMask
	mask[node/64] = 1 << (node % 64)
	return &mask
}

func (m *nodeMask) nodes() []int {
	var nodes []int
	for node := range maxNodes {
		if m[node/64]&(1<<(node%64)) != 0 {
			nodes = append(nodes, node)
		}
	}
	return nodes
}
