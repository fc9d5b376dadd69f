//go:build race

package store

// The race detector makes SQLite ten times slower: the size tests then run a
// short way, for races, and do not extrapolate.
const raceEnabled = true
