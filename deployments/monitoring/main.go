// Command monitoring writes the Prometheus rules and Grafana dashboards, here
// and into the Kubernetes component:
//
//	go run ./deployments/monitoring
//
// Run it in the root of the repository after a change to rules.go or
// dashboards.go; a test compares the files with what it would write.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"go.yaml.in/yaml/v3"
)

func main() {
	files, err := outputs()
	for name, content := range files {
		if err == nil {
			err = write(filepath.Join("deployments", "monitoring", name), content)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func write(path string, content []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("make a directory: %w", err)
	}
	if err := os.WriteFile(path, content, 0o644); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	return nil
}

// outputs returns every file by its path, seen from this directory.
func outputs() (map[string][]byte, error) {
	rules, err := rulesYAML(Groups(1))
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{"rules.yaml": rules}
	dashboards := map[string]string{}
	for _, d := range Dashboards() {
		b, err := d.JSON()
		if err != nil {
			return nil, err
		}
		files["dashboards/"+d.UID+".json"] = b
		dashboards[d.UID+".json"] = string(b)
	}
	for name, o := range map[string]object{
		"rules.yaml": {
			"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule",
			"metadata": object{"name": "fingerprint-prefetch"}, "spec": object{"groups": Groups(1)},
		},
		"dashboards.yaml": {
			"apiVersion": "v1", "kind": "ConfigMap",
			// The label by which Grafana's sidecar finds dashboards.
			"metadata": object{"name": "fingerprint-prefetch-dashboards", "labels": object{"grafana_dashboard": "1"}}, "data": dashboards,
		},
	} {
		b, err := yaml.Marshal(o)
		if err != nil {
			return nil, fmt.Errorf("write %s for Kubernetes: %w", name, err)
		}
		files["../k8s/components/prometheus-operator/"+name] = append([]byte(generated), b...)
	}
	return files, nil
}
