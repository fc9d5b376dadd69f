package receiver

import (
	"cmp"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/unitmeter/unitmeter/receiver/ebpf"
	"github.com/unitmeter/unitmeter/receiver/ledger"
)

const (
	// containerLogs has a link for each container of Kubernetes, for every runtime:
	// POD_NAMESPACE_CONTAINER-ID.log. The kubelet makes it when the container runs.
	containerLogs = "/var/log/containers"
	// generator has the units that Quadlet makes, with the podman command.
	generator = "/run/systemd/generator"
	// namePatience is how long a new container of Kubernetes waits for its name. Its
	// traffic waits in the maps.
	namePatience = time.Minute
)

// containers finds out what the host says of containers without asking an engine.
type containers struct {
	logs, generator string
	pods            map[string]ledger.Labels // by container id
	listed          time.Time                // of logs
}

func newContainers(logs, units string) *containers {
	return &containers{logs: cmp.Or(logs, containerLogs), generator: cmp.Or(units, generator)}
}

// label sets the labels of a container in a unit. What starts again under the same
// name has no id, so that it stays one series. ok is false for one of Kubernetes that
// has no name yet; it has its id. now is the time of the sweep.
func (c *containers) label(labels *ledger.Labels, who *ebpf.Container, unit string, now time.Time) (ok bool) {
	labels.Runtime = string(who.Runtime)
	switch {
	case who.Split:
		labels.ContainerName = c.quadlet(unit)
	case who.Name != "":
		labels.ContainerName = who.Name
	case who.ID == "": // the cgroup of a pod itself
	case who.Pod != "":
		pod, found := c.pod(who.ID, now)
		if !found {
			labels.ContainerID = who.ID
			return c.pods == nil // nothing is to come
		}
		labels.ContainerName, labels.Pod, labels.Namespace = pod.ContainerName, pod.Pod, pod.Namespace
	default:
		labels.ContainerID = who.ID
	}
	return true
}

// pod returns the names of a container of Kubernetes. It lists the links once in a
// sweep, if there is a new container.
func (c *containers) pod(id string, now time.Time) (labels ledger.Labels, found bool) {
	if labels, found = c.pods[id]; found || c.listed.Equal(now) {
		return labels, found
	}
	c.pods, c.listed = nil, now
	links, err := os.ReadDir(c.logs)
	if err != nil {
		return labels, false // there is no Kubernetes, or it may not be read: the id is left
	}
	c.pods = make(map[string]ledger.Labels, len(links))
	for _, link := range links {
		parts := strings.Split(strings.TrimSuffix(link.Name(), ".log"), "_")
		if len(parts) != 3 {
			continue
		}
		if dash := strings.LastIndexByte(parts[2], '-'); dash > 0 {
			c.pods[parts[2][dash+1:]] = ledger.Labels{Pod: parts[0], Namespace: parts[1], ContainerName: parts[2][:dash]}
		}
	}
	labels, found = c.pods[id]
	return labels, found
}

// quadlet returns the name of the container that a unit of Quadlet runs, empty if
// the unit is none.
func (c *containers) quadlet(unit string) string {
	stem := strings.TrimSuffix(unit, ".service")
	prefix, instance, instantiated := strings.Cut(stem, "@")
	file := unit
	if instantiated {
		file = prefix + "@.service"
	}
	text, err := os.ReadFile(filepath.Join(c.generator, file))
	if err != nil {
		return ""
	}
	match := regexp.MustCompile(`(?m)^ExecStart=.* --name[= ]["']?([^\s"']+)`).FindSubmatch(text)
	if match == nil {
		return ""
	}
	name := strings.NewReplacer("%N", stem, "%n", unit, "%p", prefix, "%i", instance).Replace(string(match[1]))
	if strings.Contains(name, "%") {
		return "" // another specifier
	}
	return name
}
