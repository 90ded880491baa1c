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
	for _, d := range Dashboards() {
		if files["dashboards/"+d.UID+".json"], err = d.JSON(); err != nil {
			return nil, err
		}
	}
	return files, nil
}
