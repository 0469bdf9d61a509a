// Upstream's stargz-snapshotter as a daemon: its `service` package, which is all that the module
// publishes, behind a socket. What its own program (`containerd-stargz-grpc`) does beside that,
// keychains, metrics and the FUSE manager, is left out.
//
//	stargz-snapshotter --address SOCKET --root DIR [--config FILE]
//
// The config file is upstream's. Logs are JSON lines on stderr. As upstream's program it keeps its
// mounts on SIGTERM and unmounts everything on SIGINT.
package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/log"
	"github.com/containerd/stargz-snapshotter/service"
	"github.com/pelletier/go-toml/v2"
	"google.golang.org/grpc"
)

func main() {
	address := flag.String("address", "", "socket to listen on")
	root := flag.String("root", "", "directory for snapshots and caches")
	config := flag.String("config", "", "config file in upstream's format")
	level := flag.String("log-level", "info", "log level")
	flag.Parse()
	if err := run(*address, *root, *config, *level); err != nil {
		fmt.Fprintln(os.Stderr, "stargz-snapshotter:", err)
		os.Exit(1)
	}
}

func run(address, root, file, level string) error {
	if address == "" || root == "" {
		return fmt.Errorf("--address and --root are needed")
	}
	if err := log.SetFormat(log.JSONFormat); err != nil {
		return err
	}
	if err := log.SetLevel(level); err != nil {
		return err
	}
	var config service.Config
	if file != "" {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if err := toml.Unmarshal(text, &config); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
	}
	if err := service.Supported(root); err != nil {
		return fmt.Errorf("not supported on %s: %w", root, err)
	}
	snapshotter, err := service.NewStargzSnapshotterService(context.Background(), root, &config)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	listener, err := net.Listen("unix", address)
	if err != nil {
		return err
	}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	select {
	case err := <-failed:
		return err
	case got := <-signals:
		server.Stop()
		if got == syscall.SIGINT {
			return snapshotter.Close()
		}
		return nil
	}
}
