package streamstest

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// NewRedisCluster starts three redis-servers as one Redis Cluster and returns
// the URL that names them all.
func NewRedisCluster(t testing.TB) (nodes []*Redis, url string) {
	t.Helper()
	create := []string{"--cluster", "create"}
	for range 3 {
		// The nodes talk to each other on a port of their own.
		_, bus, _ := net.SplitHostPort(FreeAddr(t))
		n := NewRedis(t, "--cluster-enabled", "yes", "--cluster-port", bus, "--cluster-node-timeout", "2000")
		nodes, create = append(nodes, n), append(create, n.Addr)
	}
	create = append(create, "--cluster-replicas", "0", "--cluster-yes")
	if out, err := exec.CommandContext(t.Context(), "redis-cli", create...).CombinedOutput(); err != nil {
		t.Fatalf("create a cluster: %v\n%s", err, out)
	}
	Eventually(t, "the cluster to be up", func() bool {
		for _, n := range nodes {
			if !strings.Contains(n.ask("CLUSTER", "INFO"), "cluster_state:ok") {
				return false
			}
		}
		return true
	})
	return nodes, "redis://" + nodes[0].Addr + "?addr=" + nodes[1].Addr + "&addr=" + nodes[2].Addr
}

// NewSentinels starts a replica of a primary and three sentinels, which promote
// it within seconds of the primary's end. The URL names the sentinels.
func NewSentinels(t testing.TB, primary *Redis) (replica *Redis, url string) {
	t.Helper()
	host, port, _ := net.SplitHostPort(primary.Addr)
	replica = NewRedis(t, "--replicaof", host+" "+port)
	var sentinels []*Redis
	for range 3 {
		s := &Redis{t: t, Addr: FreeAddr(t)}
		_, own, _ := net.SplitHostPort(s.Addr)
		dir := t.TempDir()
		file := filepath.Join(dir, "sentinel.conf") // a sentinel keeps its state there
		conf := fmt.Sprintf("port %s\nbind 127.0.0.1\ndir %s\nloglevel warning\n"+
			"sentinel monitor main %s %s 2\nsentinel down-after-milliseconds main 2000\nsentinel failover-timeout main 5000\n", own, dir, host, port)
		if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
			t.Fatal(err)
		}
		s.args = []string{file, "--sentinel"}
		s.Start()
		t.Cleanup(s.Kill)
		sentinels = append(sentinels, s)
		if url == "" {
			url = "redis://" + s.Addr + "/0?master_name=main"
		} else {
			url += "&addr=" + s.Addr
		}
	}
	// They find the replica and each other through the primary.
	Eventually(t, "the sentinels to know everybody", func() bool {
		for _, s := range sentinels {
			told := s.ask("SENTINEL", "MASTER", "main")
			if !strings.Contains(told, "num-slaves\n1\n") || !strings.Contains(told, "num-other-sentinels\n2\n") {
				return false
			}
		}
		return true
	})
	return replica, url
}

// ask returns a server's answer to a command, empty when there is none.
func (r *Redis) ask(command ...string) string {
	host, port, _ := net.SplitHostPort(r.Addr)
	out, _ := exec.CommandContext(r.t.Context(), "redis-cli", append([]string{"-h", host, "-p", port}, command...)...).Output()
	return string(out)
}
