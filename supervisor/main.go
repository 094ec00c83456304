// atoll-supervisor is a Kubernetes control plane in one file: upstream's API server, controller-manager, scheduler,
// kubectl and embedded etcd behind one name, and `up`, which runs them. Nothing of Kubernetes is rewritten here.
//
// Each component runs as a child process of `up`, because inside one process they would share registries of flags,
// feature gates and metrics. `up` starts its own file again under the component's name.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func main() {
	if name, ok := componentOf(os.Args); ok {
		os.Args = name.args(os.Args)
		os.Exit(name.run())
	}
	// Upstream's packages register flags of their own there, which are not this command's.
	pflag.CommandLine = pflag.NewFlagSet(os.Args[0], pflag.ContinueOnError)
	command := rootCommand()
	if err := command.Execute(); err != nil {
		var status exitStatus
		if errors.As(err, &status) {
			os.Exit(int(status))
		}
		fmt.Fprintf(os.Stderr, "atoll-supervisor: %v\n", err)
		os.Exit(1)
	}
}

// exitStatus ends the process with a status of its own, the message having been printed already.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

// called names a component and whether it came as the file's name (a link) or as the first argument.
type called struct {
	component
	byLink bool
}

// componentOf finds the upstream component that the command line asks for.
func componentOf(args []string) (called, bool) {
	if c, ok := components[filepath.Base(args[0])]; ok {
		return called{c, true}, true
	}
	if len(args) > 1 {
		if c, ok := components[args[1]]; ok {
			return called{c, false}, true
		}
	}
	return called{}, false
}

// args are the command line as the component expects it.
func (c called) args(args []string) []string {
	if c.byLink {
		return args
	}
	return args[1:]
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "atoll-supervisor",
		Short: "A Kubernetes control plane for Atoll hosts, in one file",
		Long: `A Kubernetes control plane for Atoll hosts, in one file.

Start it, and leave it running:

    atoll-supervisor up --data /var/lib/atoll-supervisor --address 10.0.0.1

Make a machine config that joins a host, and put it on the host's ESP as machine.yaml:

    atoll-supervisor token create --machine-config > machine.yaml

Look at the cluster:

    atoll-supervisor kubectl get nodes -o wide
    atoll-supervisor kubeconfig > ~/.kube/config`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(upCommand(), tokenCommand(), kubeconfigCommand(), approverCommand(), versionCommand())
	for _, name := range componentNames() {
		c := components[name]
		// For --help alone: main never lets a component's command line come here.
		root.AddCommand(&cobra.Command{Use: name, Short: c.short, DisableFlagParsing: true, Run: func(*cobra.Command, []string) {}})
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	return root
}

// dataFlag gives a command `--data`.
func dataFlag(command *cobra.Command, into *string) {
	command.Flags().StringVar(into, "data", defaultData(),
		"directory of keys, certificates and etcd, made at the first start (or $ATOLL_SUPERVISOR_DATA)")
}

func defaultData() string {
	if data := os.Getenv("ATOLL_SUPERVISOR_DATA"); data != "" {
		return data
	}
	if os.Geteuid() == 0 {
		return "/var/lib/atoll-supervisor"
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "atoll-supervisor"
	}
	return filepath.Join(home, ".local", "share", "atoll-supervisor")
}
