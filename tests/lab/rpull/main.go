// rpull pulls an image as lazy-loading clients do: the Prepare of every layer carries the labels a remote snapshotter needs.
//
//	rpull -a SOCKET [-snapshotter soci] [-labels containerd|nerdctl] [-index DIGEST] REFERENCE
//
// "containerd" is what `ctr-remote images rpull --use-containerd-labels` sends (Debian's ctr-remote is too old to have that flag);
// "nerdctl" is what nerdctl adds: sizes, and the digest of the SOCI index if one was named.
package main

import (
	"context"
	"flag"
	"log"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const remote = "containerd.io/snapshot/remote/"

// nerdctl adds its labels to the layers of every manifest, after containerd's own.
func nerdctl(index string) func(images.Handler) images.Handler {
	return func(inner images.Handler) images.Handler {
		return images.HandlerFunc(func(ctx context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
			children, err := inner.Handle(ctx, desc)
			if err != nil || !images.IsManifestType(desc.MediaType) {
				return children, err
			}
			for i := range children {
				layer := &children[i]
				if !images.IsLayerType(layer.MediaType) {
					continue
				}
				if layer.Annotations == nil {
					layer.Annotations = map[string]string{}
				}
				var sizes []string
				listed := len(strings.Split(layer.Annotations[snapshotters.TargetImageLayersLabel], ","))
				for _, c := range children[i:] {
					if images.IsLayerType(c.MediaType) && len(sizes) < listed {
						sizes = append(sizes, strconv.FormatInt(c.Size, 10))
					}
				}
				layer.Annotations[remote+"soci.size"] = strconv.FormatInt(layer.Size, 10)
				layer.Annotations[remote+"image.layers.size"] = strings.Join(sizes, ",")
				layer.Annotations[remote+"soci.index.digest"] = index
			}
			return children, nil
		})
	}
}

func main() {
	log.SetFlags(0)
	address := flag.String("a", "/run/containerd/containerd.sock", "containerd's socket")
	snapshotter := flag.String("snapshotter", "soci", "snapshotter to unpack to")
	labels := flag.String("labels", "containerd", "whose labels to send: containerd or nerdctl")
	index := flag.String("index", "", "digest of the SOCI index (with -labels nerdctl)")
	flag.Parse()
	ref := flag.Arg(0)

	wrapper := snapshotters.AppendInfoHandlerWrapper(ref)
	if *labels == "nerdctl" {
		info, more := wrapper, nerdctl(*index)
		wrapper = func(h images.Handler) images.Handler { return more(info(h)) }
	}
	c, err := client.New(*address)
	if err != nil {
		log.Fatal(err)
	}
	ctx := namespaces.WithNamespace(context.Background(), "default")
	resolver := docker.NewResolver(docker.ResolverOptions{
		Hosts: docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchAllHosts)),
	})
	if _, err := c.Pull(ctx, ref, client.WithPullUnpack, client.WithPullSnapshotter(*snapshotter),
		client.WithResolver(resolver), client.WithImageHandlerWrapper(wrapper)); err != nil {
		log.Fatal(err)
	}
}
