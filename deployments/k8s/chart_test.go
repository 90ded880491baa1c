package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/nats-io/nats-server/v2/conf"
	"sigs.k8s.io/kustomize/kyaml/yaml"
)

// chartValues are the keys of the NATS chart that our values may use. Merge is
// laid over what the chart writes itself.
type chartValues struct {
	Config struct {
		Cluster struct {
			Enabled  bool
			Replicas int
			TLS      chartTLS
			Merge    map[string]any
		}
		NATS      struct{ TLS chartTLS }
		JetStream struct {
			Enabled     bool
			MemoryStore struct {
				Enabled bool
				MaxSize string
			}
			FileStore struct {
				MaxSize string
				PVC     struct{ Size string }
			}
			Merge map[string]any
		}
		Merge map[string]any
	}
	Container struct {
		Image struct{ Tag string }
		Env   map[string]string
		Merge json.RawMessage
	}
	Reloader struct {
		Enabled bool
		Env     map[string]string
		Merge   json.RawMessage
	}
	PodTemplate struct {
		TopologySpreadConstraints map[string]struct {
			MaxSkew           int
			WhenUnsatisfiable string
		}
		Merge struct{ Spec json.RawMessage }
	}
	PodDisruptionBudget struct {
		Merge struct {
			Spec struct{ UnhealthyPodEvictionPolicy string }
		}
	}
	NATSBox struct{ Enabled bool }
}

type chartTLS struct {
	Enabled    bool
	SecretName string
	Merge      map[string]any
}

func readChartValues(t *testing.T) chartValues {
	t.Helper()
	b, err := os.ReadFile("nats-chart-values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	y, err := yaml.Parse(string(b))
	if err != nil {
		t.Fatal(err)
	}
	if b, err = y.MarshalJSON(); err != nil {
		t.Fatal(err)
	}
	var v chartValues
	strictly(t, b, &v)
	return v
}

func strictly(t *testing.T, b []byte, v any) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		t.Fatal(err)
	}
}

// conf is the nats.conf that the chart writes for the values: JSON in which
// << >> stands for unquoted, and keys that end in $include for an include.
func (v chartValues) conf(t *testing.T) string {
	t.Helper()
	over := func(own, merge map[string]any) map[string]any {
		maps.Copy(own, merge)
		return own
	}
	tls := func(name string, c chartTLS) map[string]any {
		if !c.Enabled || c.SecretName != "nats-server" {
			t.Errorf("%s has no TLS from the Secret nats-server", name)
		}
		dir := "/etc/nats-certs/" + name + "/"
		return over(map[string]any{"cert_file": dir + "tls.crt", "key_file": dir + "tls.key"}, c.Merge)
	}
	routes := []string{}
	for i := range v.Config.Cluster.Replicas {
		routes = append(routes, fmt.Sprintf("tls://nats-%d.nats-headless:6222", i))
	}
	c, js := v.Config.Cluster, v.Config.JetStream
	if !c.Enabled || !js.Enabled || !js.MemoryStore.Enabled {
		t.Error("no cluster, or no JetStream")
	}
	b, err := json.Marshal(over(map[string]any{
		"server_name": "<< $POD_NAME >>", "pid_file": "/var/run/nats/nats.pid", "lame_duck_grace_period": "10s", "lame_duck_duration": "30s",
		"port": 4222, "http_port": 8222,
		"tls":     tls("nats", v.Config.NATS.TLS),
		"cluster": over(map[string]any{"name": "nats", "port": 6222, "no_advertise": true, "routes": routes, "tls": tls("cluster", c.TLS)}, c.Merge),
		"jetstream": over(map[string]any{
			"store_dir": "/data", "max_memory_store": "<< " + js.MemoryStore.MaxSize + " >>", "max_file_store": "<< " + js.FileStore.MaxSize + " >>",
		}, js.Merge),
	}, v.Config.Merge))
	if err != nil {
		t.Fatal(err)
	}
	text := strings.NewReplacer(`\u003c`, "<", `\u003e`, ">").Replace(string(b))
	text = regexp.MustCompile(`"[^"]*\$include":"([^"]*)",?`).ReplaceAllString(text, "include $1;")
	return regexp.MustCompile(`"<<\s+([^"]*?)\s+>>"`).ReplaceAllString(text, "$1")
}

// TestChartValuesGiveTheShippedConfiguration reads both configurations as
// nats-server does: the chart's server must be told what ours is told.
func TestChartValuesGiveTheShippedConfiguration(t *testing.T) {
	t.Setenv("POD_NAME", "nats-0")
	file := filepath.Join(t.TempDir(), "nats.conf")
	users, err := os.ReadFile("components/nats/users.conf")
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{file: readChartValues(t).conf(t), filepath.Join(filepath.Dir(file), "users.conf"): string(users)} {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, want := settings(t, file), settings(t, "components/nats/nats.conf")
	if want["authorization.users"] == "" || want["jetstream.sync_interval"] != "always" {
		t.Fatalf("nats.conf says %v", want)
	}
	// The same in other words.
	for key, words := range map[string][2]string{
		"pid_file":      {"/run/nats/nats.pid", "/var/run/nats/nats.pid"},
		"listen":        {"0.0.0.0:4222", ""},
		"port":          {"", "4222"},
		"http":          {"0.0.0.0:8222", ""},
		"http_port":     {"", "8222"},
		"tls.cert_file": {"/run/secrets/nats/tls.crt", "/etc/nats-certs/nats/tls.crt"}, "cluster.tls.cert_file": {"/run/secrets/nats/tls.crt", "/etc/nats-certs/cluster/tls.crt"},
		"tls.key_file": {"/run/secrets/nats/tls.key", "/etc/nats-certs/nats/tls.key"}, "cluster.tls.key_file": {"/run/secrets/nats/tls.key", "/etc/nats-certs/cluster/tls.key"},
		"tls.ca_file": {"/run/secrets/nats/ca.crt", "/etc/nats-certs/nats/ca.crt"}, "cluster.tls.ca_file": {"/run/secrets/nats/ca.crt", "/etc/nats-certs/cluster/ca.crt"},
		"cluster.listen": {"0.0.0.0:6222", ""},
		"cluster.port":   {"", "6222"},
		"cluster.routes": {
			"[nats-route://nats-0.nats-headless:6222 nats-route://nats-1.nats-headless:6222 nats-route://nats-2.nats-headless:6222]",
			"[tls://nats-0.nats-headless:6222 tls://nats-1.nats-headless:6222 tls://nats-2.nats-headless:6222]",
		},
		"cluster.no_advertise": {"", "true"}, // clients come by the Service
	} {
		if want[key] != words[0] || got[key] != words[1] {
			t.Errorf("%s: ours says %q, want %q; the chart's %q, want %q", key, want[key], words[0], got[key], words[1])
		}
		delete(want, key)
		delete(got, key)
	}
	for key, g := range got {
		if _, ok := want[key]; !ok {
			t.Errorf("only the chart's says %s: %s", key, g)
		}
	}
	for key, w := range want {
		if got[key] != w {
			t.Errorf("%s: ours says %s, the chart's %s", key, w, got[key])
		}
	}
}

// settings reads a configuration, includes and all, by the path of each key.
func settings(t *testing.T, file string) map[string]string {
	t.Helper()
	parsed, err := conf.ParseFile(file)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	var flatten func(path string, v any)
	flatten = func(path string, v any) {
		m, ok := v.(map[string]any)
		if !ok {
			out[path] = fmt.Sprint(v)
			return
		}
		for k, v := range m {
			flatten(strings.TrimPrefix(path+"."+k, "."), v)
		}
	}
	flatten("", parsed)
	return out
}

// TestChartValuesAreRestricted holds the chart's pods against the policy of our
// own.
func TestChartValuesAreRestricted(t *testing.T) {
	v := readChartValues(t)
	if !v.Reloader.Enabled || v.NATSBox.Enabled {
		t.Error("no reloader, or nats-box, which nothing here restricts")
	}
	fail := func(bad bool, what string) {
		t.Helper()
		if bad {
			t.Error(what)
		}
	}
	var pod, ours podSpec
	strictly(t, v.PodTemplate.Merge.Spec, &pod)
	restrictPod(fail, pod)
	for name, c := range map[string]struct {
		merge json.RawMessage
		env   map[string]string
	}{"nats": {v.Container.Merge, v.Container.Env}, "reloader": {v.Reloader.Merge, v.Reloader.Env}} {
		got := container{Name: name}
		strictly(t, c.merge, &got)
		for k, value := range c.env {
			got.Env = append(got.Env, envVar{Name: k, Value: value})
		}
		restrictContainer(t, func(bad bool, what string) { t.Helper(); fail(bad, name+": "+what) }, got)
	}

	// What the StatefulSet of components/nats has besides.
	for _, o := range workloads(render(t, "production")) {
		if o.Metadata.Name != "nats" {
			continue
		}
		ours = o.Spec.Template.Spec
		if image, _, _ := strings.Cut("nats:"+v.Container.Image.Tag, "-alpine"); image != ours.Containers[0].Image {
			t.Errorf("image %s, ours %s", image, ours.Containers[0].Image)
		}
		for _, c := range ours.TopologySpreadConstraints {
			if v.PodTemplate.TopologySpreadConstraints[c.TopologyKey].MaxSkew != 1 {
				t.Errorf("not spread over %s", c.TopologyKey)
			}
		}
		if have, want := v.Config.JetStream.FileStore.PVC.Size, o.Spec.VolumeClaimTemplates[0].Spec.Resources.Requests["storage"]; have != want {
			t.Errorf("a volume of %s, ours has %s", have, want)
		}
	}
	if len(ours.Containers) == 0 || pod.TerminationGracePeriodSeconds != ours.TerminationGracePeriodSeconds {
		t.Errorf("%d s to end, ours has %d", pod.TerminationGracePeriodSeconds, ours.TerminationGracePeriodSeconds)
	}
	if v.PodDisruptionBudget.Merge.Spec.UnhealthyPodEvictionPolicy != "AlwaysAllow" {
		t.Error("an unhealthy server holds a node's drain up")
	}
}
