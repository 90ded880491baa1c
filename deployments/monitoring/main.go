// Command monitoring writes the Prometheus rules and Grafana dashboards.
package main

func main() {}
