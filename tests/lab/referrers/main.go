// A registry with the referrers API, in memory: the one thing the packaged registries lack.
package main

import (
	"log"
	"net/http"
	"os"

	"github.com/google/go-containerregistry/pkg/registry"
)

func main() {
	handler := registry.New(registry.WithReferrersSupport(true), registry.Logger(log.New(os.Stderr, "", log.Lmicroseconds)))
	log.Fatal(http.ListenAndServe(os.Args[1], handler))
}
