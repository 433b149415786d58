module rpull

go 1.24

require (
	github.com/containerd/containerd/v2 v2.2.1
	github.com/opencontainers/image-spec v1.1.1
)
