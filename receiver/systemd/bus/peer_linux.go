package bus

import "syscall"

// Peer returns the process that listens at the other end: systemd on its private
// socket, else the bus daemon, or who opened its socket. It is 0 for a process
// outside of this one's PID namespace (SO_PEERCRED, socket(7)).
func (c *Conn) Peer() (pid int, err error) {
	err = c.connection.conn.(*socket).control(func(fd int) error {
		credentials, err := syscall.GetsockoptUcred(fd, syscall.SOL_SOCKET, syscall.SO_PEERCRED)
		if err == nil {
			pid = int(credentials.Pid)
		}
		return err
	})
	return pid, err
}
