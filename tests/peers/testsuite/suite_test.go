// Package testsuite runs containerd's own snapshotter suite against a running daemon.
//
//	SNAPSHOTS_SOCKET=/path/sd.sock go test -v ./...
//
// The suite uses literal keys, so the daemon's store must be fresh. It mounts: run it as root, in a
// mount namespace of its own.
package testsuite

import (
	"context"
	"os"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

func TestSnapshotter(t *testing.T) {
	socket := os.Getenv("SNAPSHOTS_SOCKET")
	if socket == "" {
		t.Skip("SNAPSHOTS_SOCKET names no daemon")
	}
	plugin := os.Getenv("SNAPSHOTS_PLUGIN")
	if plugin == "" {
		plugin = "overlayfs"
	}
	connection, err := grpc.NewClient("unix://"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	// The cases run in parallel, after this function has returned.
	t.Cleanup(func() { connection.Close() })
	client := snapshotsapi.NewSnapshotsClient(connection)
	// The suite's name decides whether directories of a lower layer are renamed: not on overlayfs.
	testsuite.SnapshotterSuite(t, "overlayfs",
		func(context.Context, string) (snapshots.Snapshotter, func() error, error) {
			return proxy.NewSnapshotter(client, plugin), nil, nil
		})
}
