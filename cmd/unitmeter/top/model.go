package top

import (
	"slices"
	"strings"

	tea "charm.land/bubbletea/v2"

	"github.com/unitmeter/unitmeter/cmd/unitmeter/accounting"
)

// screenKind is what top shows.
type screenKind int

const (
	unitScreen   screenKind = iota // all units
	sliceScreen                    // their sums by slice
	detailScreen                   // one unit or slice
	helpScreen
)

// topModel is the state of the screen. Bubble Tea calls its methods one at a
// time.
type topModel struct {
	board         *board
	origin        accounting.Origin // of the readings
	exact         bool
	width, height int

	screen screenKind
	list   screenKind // the list that detailScreen and helpScreen go back to
	sort   column
	back   bool // sorted the other way round
	filter string
	typing bool // what is typed goes into the filter
	paused bool
	// cursor is the name of the selected row: it stays on it while rows move.
	// Empty is the first row, whichever that is.
	cursor string
	top    int // the first row on the screen
	notice string
	rows   []*topRow // as shown: filtered and sorted
}

// newTopModel begins with the units, the busiest of the last minute first: a sort
// by the present speed would jump with each reading. The size is that of the
// smallest terminal until the real one is known.
func newTopModel(b *board, origin accounting.Origin, exact bool) *topModel {
	return &topModel{board: b, origin: origin, exact: exact, width: 80, height: 24, sort: byRecent, notice: "reading all units ..."}
}

// Init implements tea.Model.
func (m *topModel) Init() tea.Cmd { return nil }

// Update implements tea.Model.
func (m *topModel) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		m.width, m.height = msg.Width, msg.Height
	case accounting.Sweep:
		// What is read while the screen is stopped is left out: the next interval
		// then spans the pause, so that no byte is missing.
		if m.paused {
			return m, nil
		}
		m.notice = ""
		if msg.Partial {
			m.notice = "not all units could be read; the speeds of the others are left open"
		}
		m.board.take(msg.Time, msg.Units)
	case tea.KeyPressMsg:
		if quit := m.press(msg); quit {
			return m, tea.Quit
		}
	}
	m.arrange()
	return m, nil
}

// press handles a key. It returns true to end the program.
func (m *topModel) press(key tea.KeyPressMsg) bool {
	name := key.String()
	// In raw mode a terminal sends no signal for it.
	if name == "ctrl+c" {
		return true
	}
	if m.typing {
		m.typeFilter(name, key.Text)
		return false
	}
	switch name {
	// In a screen above a list, q is what esc is: nobody who wants to leave the
	// help means to end the program.
	case "q":
		if m.screen == detailScreen || m.screen == helpScreen {
			m.screen = m.list
			return false
		}
		return true
	case "esc", "backspace":
		if m.screen == detailScreen || m.screen == helpScreen {
			m.screen = m.list
		} else {
			m.filter = ""
		}
	case "?", "h":
		m.screen = helpScreen
	case "space", "p":
		m.paused = !m.paused
	case "b":
		m.exact = !m.exact
	default:
		if m.screen == unitScreen || m.screen == sliceScreen {
			m.pressInList(name)
		}
	}
	return false
}

// pressInList handles the keys of the lists.
func (m *topModel) pressInList(name string) {
	page := max(1, m.listHeight()-1)
	switch name {
	case "up", "k":
		m.move(-1)
	case "down", "j":
		m.move(1)
	case "pgup":
		m.move(-page)
	case "pgdown":
		m.move(page)
	// Not the row that is first now, but whichever will be.
	case "home", "g":
		m.cursor = ""
	case "end", "G":
		m.move(len(m.rows))
	case "enter":
		if r := m.selected(); r != nil {
			m.cursor, m.screen = r.name, detailScreen
		}
	// The cursor is on a name, which the other list does not have.
	case "s", "tab":
		m.list = sliceScreen
		if m.screen == sliceScreen {
			m.list = unitScreen
		}
		m.screen, m.cursor, m.top = m.list, "", 0
	case "/":
		m.typing = true
	case "r":
		m.back = !m.back
	case "left", "<", "right", ">":
		m.nextColumn(name == "left" || name == "<")
	default:
		if c, ok := map[string]column{"n": byName, "i": byIn, "o": byOut, "t": byTotal, "m": byRecent}[name]; ok {
			m.sortBy(c)
		}
	}
}

// typeFilter edits the filter: a part of a unit's name.
func (m *topModel) typeFilter(name, text string) {
	switch name {
	case "enter":
		m.typing = false
	case "esc":
		m.typing, m.filter = false, ""
	case "backspace":
		if m.filter != "" {
			m.filter = m.filter[:len(m.filter)-1]
		}
	case "ctrl+u":
		m.filter = ""
	default:
		for _, r := range text {
			// The names of units are ASCII.
			if r > ' ' && r < 0x7f && len(m.filter) < 40 {
				m.filter += string(r)
			}
		}
	}
}

// sortBy sorts by a column, or turns the order around if it is that already.
func (m *topModel) sortBy(c column) {
	// A new column begins in its own order: names from a to z, numbers from the
	// largest.
	m.back = m.sort == c && !m.back
	m.sort = c
}

// nextColumn goes through the columns that there is room for.
func (m *topModel) nextColumn(back bool) {
	// A column without room may be the one that was sorted by, when the window
	// has become smaller: the search then begins before the first.
	shown := m.columns()
	i := slices.IndexFunc(shown, func(c shownColumn) bool { return c.column == m.sort })
	step := 1
	if back {
		step = -1
	}
	m.sort, m.back = shown[(i+step+len(shown))%len(shown)].column, false
}

// move moves the cursor by n rows.
func (m *topModel) move(n int) {
	if len(m.rows) == 0 {
		return
	}
	m.cursor = m.rows[min(max(m.position()+n, 0), len(m.rows)-1)].name
}

// arrange brings the rows up to date, and keeps the cursor on the screen.
func (m *topModel) arrange() {
	rows := m.board.all()
	if m.list == sliceScreen {
		rows = m.board.bySlice()
	}
	if m.filter != "" {
		// In small letters on both sides: a filter is typed in a hurry.
		rows = slices.DeleteFunc(rows, func(r *topRow) bool {
			return !strings.Contains(strings.ToLower(r.name), strings.ToLower(m.filter))
		})
	}
	m.rows = m.board.sorted(rows, m.sort, m.back)
	if m.screen == detailScreen {
		return // the cursor names what is shown, even if it is gone
	}
	if m.selected() == nil {
		m.cursor = ""
	}
	// First no further down than that the screen is full, then as far as the
	// cursor needs it.
	height, at := m.listHeight(), m.position()
	m.top = max(0, min(m.top, len(m.rows)-height))
	m.top = max(min(m.top, at), at-height+1)
}

// position is the place of the selected row.
func (m *topModel) position() int {
	return max(0, slices.IndexFunc(m.rows, func(r *topRow) bool { return r.name == m.cursor }))
}

// selected is the row under the cursor; nil if it has gone, or there is none.
func (m *topModel) selected() *topRow {
	if len(m.rows) == 0 {
		return nil
	}
	r := m.rows[m.position()]
	if m.cursor != "" && r.name != m.cursor {
		return nil
	}
	return r
}

// View implements tea.Model.
func (m *topModel) View() tea.View {
	v := tea.NewView(strings.Join(m.lines(), "\n"))
	v.AltScreen = true
	v.WindowTitle = "unitmeter top"
	return v
}
