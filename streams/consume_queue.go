package streams

// queue is first in, first out, without moving what is in it.
type queue struct {
	items []*Delivery
	head  int
}

func (q *queue) len() int { return len(q.items) - q.head }

func (q *queue) at(i int) *Delivery { return q.items[q.head+i] }

func (q *queue) push(d *Delivery) { q.items = append(q.items, d) }

func (q *queue) front() *Delivery {
	if q.len() == 0 {
		return nil
	}
	return q.items[q.head]
}

// pop removes the first n; the caller owns the result.
func (q *queue) pop(n int) []*Delivery {
	out := make([]*Delivery, n)
	copy(out, q.items[q.head:])
	clear(q.items[q.head : q.head+n])
	q.head += n
	if q.head == len(q.items) {
		q.items, q.head = q.items[:0], 0
	} else if q.head > 1024 && q.head > len(q.items)/2 {
		k := copy(q.items, q.items[q.head:])
		clear(q.items[k:])
		q.items, q.head = q.items[:k], 0
	}
	return out
}

// parking is a heap of parked messages by when they are due.
type parking []*Delivery

func (p parking) Len() int           { return len(p) }
func (p parking) Less(i, j int) bool { return p[i].due.Before(p[j].due) }
func (p parking) Swap(i, j int)      { p[i], p[j] = p[j], p[i] }
func (p *parking) Push(x any)        { *p = append(*p, x.(*Delivery)) }
func (p *parking) Pop() any {
	old := *p
	d := old[len(old)-1]
	old[len(old)-1] = nil
	*p = old[:len(old)-1]
	return d
}
