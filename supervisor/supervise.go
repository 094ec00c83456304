package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"time"
)

const (
	backoffFirst = time.Second
	backoffMost  = 30 * time.Second
	// steadyAfter is how long a child must have run for its next failure to count as the first.
	steadyAfter = time.Minute
)

// child is one supervised process.
type child struct {
	name string
	args []string
	// before is awaited before each start, so that a component never starts into a missing peer.
	before func(context.Context) error
	// ready is awaited once after the first start.
	ready func(context.Context) error
	// readyWithin bounds ready.
	readyWithin time.Duration
	// stopWithin is the time between TERM and KILL.
	stopWithin time.Duration
}

// backoff is the wait before start number `failures`+1 in a row.
func backoff(failures int) time.Duration {
	wait := backoffFirst
	for range failures - 1 {
		wait *= 2
		if wait >= backoffMost {
			return backoffMost
		}
	}
	return wait
}

// spawner starts processes from one thread that never ends: the kernel sends a parent-death signal when the *thread*
// that made the child ends, and Go's threads come and go.
type spawner struct{ requests chan func() }

func newSpawner() *spawner {
	s := &spawner{requests: make(chan func())}
	go func() {
		runtime.LockOSThread()
		for start := range s.requests {
			start()
		}
	}()
	return s
}

func (s *spawner) start(command *exec.Cmd) error {
	result := make(chan error, 1)
	s.requests <- func() { result <- command.Start() }
	return <-result
}

// runner keeps one child running until it is stopped.
type runner struct {
	child
	spawner *spawner
	l       layout
	stop    context.CancelFunc
	stopped chan struct{}
}

// startRunner starts the child and waits until it is ready.
func startRunner(ctx context.Context, c child, s *spawner, l layout) (*runner, error) {
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	r := &runner{child: c, spawner: s, l: l, stop: stop, stopped: make(chan struct{})}
	started := time.Now()
	go r.keep(running)
	if c.ready == nil {
		return r, nil
	}
	waiting, cancel := context.WithTimeout(ctx, c.readyWithin)
	defer cancel()
	if err := c.ready(waiting); err != nil {
		return r, fmt.Errorf("%s is not ready after %s: %w: its log is %s", c.name, time.Since(started).Round(100*time.Millisecond), err, l.log(c.name))
	}
	slog.Info(c.name+" ready", "after", time.Since(started).Round(100*time.Millisecond))
	return r, nil
}

// keep starts the child again whenever it ends, until stop.
func (r *runner) keep(ctx context.Context) {
	defer close(r.stopped)
	failures := 0
	for {
		if r.before != nil && r.before(ctx) != nil {
			return // only ends with an error when ctx does
		}
		began := time.Now()
		err := r.once(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > steadyAfter {
			failures = 0
		}
		failures++
		wait := backoff(failures)
		slog.Error(r.name+" ended, starting it again", "why", err, "in", wait, "log", r.l.log(r.name))
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// once runs the child to its end; when ctx ends it is told to stop, then killed.
func (r *runner) once(ctx context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	log, err := openLog(r.l.log(r.name))
	if err != nil {
		return err
	}
	defer log.Close()
	command := exec.Command(self, r.args...)
	command.Dir = r.l.runDir()
	command.Stdout, command.Stderr = log, log
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := r.spawner.start(command); err != nil {
		return fmt.Errorf("cannot start: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- command.Wait() }()
	select {
	case err := <-ended:
		if err == nil {
			err = errors.New("exit status 0")
		}
		return err
	case <-ctx.Done():
	}
	_ = command.Process.Signal(syscall.SIGTERM) // it may have ended this instant
	select {
	case err := <-ended:
		return err
	case <-time.After(r.stopWithin):
	}
	slog.Warn(r.name+" did not stop in time, killing it", "after", r.stopWithin)
	_ = command.Process.Kill() // as above
	return <-ended
}

// stopAll stops runners side by side and waits for all; bounded by their stopWithin.
func stopAll(runners ...*runner) {
	var all sync.WaitGroup
	for _, r := range runners {
		if r == nil {
			continue
		}
		all.Go(func() {
			r.stop()
			<-r.stopped
		})
	}
	all.Wait()
}

// logLimit bounds a component's log; one older file of the same size is kept.
const logLimit = 16 << 20

// boundedLog is a log file that turns over at logLimit.
type boundedLog struct {
	mutex sync.Mutex
	path  string
	file  *os.File
	size  int64
}

func openLog(path string) (*boundedLog, error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return &boundedLog{path: path, file: file, size: info.Size()}, nil
}

func (b *boundedLog) Write(text []byte) (int, error) {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	if b.size+int64(len(text)) > logLimit {
		if err := b.turn(); err != nil {
			return 0, err
		}
	}
	n, err := b.file.Write(text)
	b.size += int64(n)
	return n, err
}

func (b *boundedLog) turn() error {
	if err := errors.Join(b.file.Close(), os.Rename(b.path, b.path+".1")); err != nil {
		return err
	}
	file, err := os.OpenFile(b.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	b.file, b.size = file, 0
	return nil
}

func (b *boundedLog) Close() error {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	return b.file.Close()
}
