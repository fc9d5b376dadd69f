package store

import (
	"fmt"

	"github.com/klauspost/compress/zstd"

	"github.com/unitmeter/unitmeter/exporter/store/record"
)

// Successive requests differ in little more than their times. So each is
// compressed with an earlier one, the frame, as its dictionary: 580 kB become
// 20 kB where alone they would be 57 kB. A frame is stored once, beside the
// requests that need it, and goes when the last of them has gone.
const (
	frameMinRequest = 1 << 10 // smaller requests are compressed alone
	frameMaxUses    = 64      // then the next request becomes the frame
	frameMinUses    = 8       // before that not even when it fits badly
)

// frameWriter compresses requests. Each list of requests that lie side by side
// in the outbox has its own.
type frameWriter struct {
	dict *zstd.Encoder // with the current frame as dictionary
	id   int64         // of the current frame; 0 = none
	uses int
	best int // bytes of the smallest request made with this frame
}

// encoded is a compressed request. If newFrame is not nil, it must be stored
// under the id frame in the same transaction.
type encoded struct {
	body     []byte
	frame    int64 // 0 = needs none
	newFrame []byte
}

// encode compresses request; nextID is the id to give to a frame it starts.
func (w *frameWriter) encode(request []byte, nextID int64) (encoded, error) {
	if len(request) < frameMinRequest {
		return encoded{body: record.Compress(request)}, nil
	}
	if w.id != 0 && w.uses < frameMaxUses {
		body := w.dict.EncodeAll(request, nil)
		if len(body) <= 2*w.best || w.uses < frameMinUses {
			w.uses++
			w.best = min(w.best, len(body))
			return encoded{body: body, frame: w.id}, nil
		}
	}
	// What a request repeats lies as far back as the frame is long, and a little
	// more where units have come since. With many more, it fits badly anyway.
	dict, err := record.NewEncoder(len(request)+len(request)/64, zstd.WithEncoderDictRaw(uint32(nextID), request))
	if err != nil {
		return encoded{}, fmt.Errorf("make encoder: %w", err)
	}
	w.dict, w.id, w.uses, w.best = dict, nextID, 1, len(request)
	return encoded{body: dict.EncodeAll(request, nil), frame: nextID, newFrame: record.Compress(request)}, nil
}

// forget makes the next request start a new frame.
func (w *frameWriter) forget() { w.dict, w.id = nil, 0 }

// frameReader decompresses requests. It holds the decoder of the frame that was
// used last, since neighbours share their frame.
type frameReader struct {
	plain *zstd.Decoder
	dict  *zstd.Decoder
	id    int64
}

// decode decompresses body; load fetches the frame if it is not at hand.
func (r *frameReader) decode(body []byte, frame int64, load func(id int64) ([]byte, error)) ([]byte, error) {
	if r.plain == nil {
		var err error
		if r.plain, err = record.NewDecoder(); err != nil {
			return nil, fmt.Errorf("make decoder: %w", err)
		}
	}
	if frame == 0 {
		return r.plain.DecodeAll(body, nil)
	}
	if r.id != frame {
		packed, err := load(frame)
		if err != nil {
			return nil, err
		}
		content, err := r.plain.DecodeAll(packed, nil)
		if err != nil {
			return nil, fmt.Errorf("record.Decompress frame %d: %w", frame, err)
		}
		dict, err := record.NewDecoder(zstd.WithDecoderDictRaw(uint32(frame), content))
		if err != nil {
			return nil, fmt.Errorf("make decoder: %w", err)
		}
		r.close()
		r.dict, r.id = dict, frame
	}
	return r.dict.DecodeAll(body, nil)
}

// close gives up the decoder with the dictionary.
func (r *frameReader) close() {
	if r.dict != nil {
		r.dict.Close()
	}
	r.dict, r.id = nil, 0
}

// release gives up both decoders, and a MiB or two with them.
func (r *frameReader) release() {
	r.close()
	if r.plain != nil {
		r.plain.Close()
	}
	r.plain = nil
}

// requestSize returns how long the request in body is, or 0 if body is damaged.
func requestSize(body []byte) int {
	var h zstd.Header
	if h.Decode(body) != nil || !h.HasFCS || h.FrameContentSize > record.MaxSize {
		return 0
	}
	return int(h.FrameContentSize)
}
