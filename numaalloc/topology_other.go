//go:build !linux

package numaalloc

func allowedNow() ([]int, error) { return AllowedCPUs() }
